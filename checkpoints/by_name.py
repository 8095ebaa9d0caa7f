"""Pretrained weights by name, from timm, torchvision and Hugging Face, downloaded into these libraries' own caches.

A name is resolved to a local file or folder, which is then read like any other. This module opens files only to compute
their hashes.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import functools
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision

from checkpoints.hugging_face import WEIGHTS, weight_files
from checkpoints.safe_load import file_sha256, look_at
from models.backbones import TIMM, timm_config
from runtime.errors import UserError
from runtime.outputs import no_link
from runtime.packages import need_package

TORCHVISION, HUB = "torchvision:", "hf:"
NAME_HELP = f"or by name, {TIMM}NAME, {TORCHVISION}WEIGHTS, {HUB}OWNER/NAME"
SILENCE = 60.0  # seconds without a byte, after which a download is given up
Found = tuple[Path, str | None]  # a file or a folder, and the architecture if the name implies one


def is_name(weights: str | Path) -> bool:
    """Whether ``weights`` is a name rather than a path."""
    return str(weights).startswith((TIMM, TORCHVISION, HUB))


def locate(weights: str | Path, flag: str) -> Found:
    """The file or folder of ``weights``, a path or a name, and the architecture if the name implies one.

    A name is looked up once per process; its weights are downloaded unless the library's cache holds them. Raises
    :class:`UserError` for an unknown name, and if the weights are not cached and cannot be downloaded.
    """
    return _fetched(str(weights), flag) if is_name(weights) else (Path(weights), None)


def look_at_weights(weights: str | Path, flag: str) -> None:
    """Raise :class:`UserError` for a path where no checkpoint can be, without reading it; names are not looked up."""
    if not is_name(weights):
        path = Path(weights)
        for file in weight_files(path, flag) if path.is_dir() else [path]:
            look_at(file, flag)


def sha256_of(weights: str | Path, flag: str) -> str | None:
    """SHA-256 of the weights, or of the files of a folder with weights; None if a file is missing."""
    path, _ = locate(weights, flag)
    files = weight_files(path, flag) if path.is_dir() else [path]
    return file_sha256(*files) if all(file.is_file() for file in files) else None


def folder_beside(weights: str | Path) -> Path:
    """The default folder for results computed with ``weights``: their own folder, or for a name the current one, as
    results do not belong in a cache."""
    return Path() if is_name(weights) else Path(weights).parent


def short_name(weights: str | Path) -> str:
    """The network's name in tables: the name without its source, or the file's name without its suffix."""
    return str(weights).partition(":")[2].rpartition("/")[2] if is_name(weights) else Path(weights).stem


@functools.cache
def _fetched(name: str, flag: str) -> Found:
    source = next(source for source in SOURCES if name.startswith(source))
    return SOURCES[source](name.removeprefix(source), f"{flag} {name}".strip())


def _timm(name: str, what: str) -> Found:
    """The file that timm's configuration of the network names: on the hub or, for some older networks, at a URL."""
    config = timm_config(name, what)
    if config is None or not (config.hf_hub_id or config.url):
        raise UserError(f"{what}: timm has no pretrained weights of this network; give another of its names "
                        "(timm.list_models(pretrained=True))")
    arch = f"{TIMM}{name.partition('.')[0]}" + f".{config.tag}" * bool(config.tag)
    if not config.hf_hub_id or (config.url and not _has_hub()):
        return _from_address(config.url, what), arch
    file = config.hf_hub_filename or "pytorch_model.bin"
    safe = {"pytorch_model.bin": WEIGHTS[0], "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}.get(file)
    repository, _, revision = config.hf_hub_id.partition("@")
    folder, file = _from_hub(repository, revision, [safe, file] if safe else [file], what,
                             f"{safe or file} from {{page}} and give that file, with the architecture {arch}")
    return folder / file, arch


def _torchvision(name: str, what: str) -> Found:
    """The file of one of torchvision's weights, such as ``ResNet50_Weights.IMAGENET1K_V2``."""
    kind, _, version = name.partition(".")
    arch, known = kind.removesuffix("_Weights").lower(), torchvision.models.list_models(module=torchvision.models)
    if arch in known:
        versions = torchvision.models.get_model_weights(arch)
        if version in versions.__members__:
            return _from_address(versions[version].url, what), arch
        raise UserError(f"{what} is not one of torchvision's weights; for {arch} give one of "
                        f"{', '.join(f'{TORCHVISION}{x}' for x in versions)}")
    near = difflib.get_close_matches(kind, [x for x in vars(torchvision.models) if x.endswith("_Weights")], n=3)
    raise UserError(f"{what} is not one of torchvision's weights of a classifier; "
                    + (f"did you mean {', '.join(near)}?" if near else "give, for example, "
                       f"{TORCHVISION}ResNet50_Weights.IMAGENET1K_V2"))


def _hugging_face(name: str, what: str) -> Found:
    """The folder of a model on the hub: its weights, config.json, preprocessor_config.json."""
    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{what} is not a model on the hub; give {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION")
    return _from_hub(repository, revision, WEIGHTS, what,
                     f"{WEIGHTS[0]} and config.json from {{page}} into a folder and give that folder")[0], None


SOURCES: dict[str, Callable[[str, str], Found]] = {TIMM: _timm, TORCHVISION: _torchvision, HUB: _hugging_face}


def _from_address(url: str, what: str) -> Path:
    """The file of a URL in torch.hub's cache, downloaded if it is missing. Its hash must match the one in its name."""
    place = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", place.name)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            with _alone(place.with_name(f".{place.name}.lock")), _patience():
                if not place.exists():  # unless another process has downloaded it meanwhile
                    torch.hub.download_url_to_file(url, str(place), named and named[1])
        fits = not named or file_sha256(place).startswith(named[1])
    except (OSError, RuntimeError) as error:  # RuntimeError means a wrong hash
        raise UserError(f"{what}: {url} could not be downloaded ({_words(error)}); download it on a machine with "
                        f"network access, put it at {place}, and start again") from None
    if not fits:
        raise UserError(f"{what}: {place} is damaged or another file, since its SHA-256 does not begin with "
                        f"{named[1]}; remove it, so that it is downloaded again")
    return place


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Connections made within give up after :data:`SILENCE`: torch.hub waits for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock ``path``. Other processes wait for it, on this machine and usually also on others with the same
    disk."""
    file = no_link(path, os.O_RDWR | os.O_CREAT)
    try:
        with contextlib.suppress(OSError):  # without file locks each process downloads the file, and the last one stays
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _has_hub() -> bool:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        return False
    return True


def _from_hub(repository: str, revision: str, files: Sequence[str], what: str, by_hand: str) -> tuple[Path, str]:
    """The folder of a model in huggingface_hub's cache, and the first of ``files`` that it holds, whole or in parts.
    ``by_hand``: what to download manually instead, with ``{page}`` for the URL."""
    page = f"https://huggingface.co/{repository}"
    by_hand = f"download {by_hand.format(page=page)}"
    need_package("huggingface_hub", what, otherwise=by_hand)
    from huggingface_hub import constants, errors, snapshot_download

    offline: Exception | None = None
    for name in files:
        start, dot, ending = name.partition(".")
        wanted = ["config.json", "preprocessor_config.json", name, f"{name}.index.json", f"{start}-*{dot}{ending}"]
        try:
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted,
                                            local_files_only=offline is not None))
        except errors.LocalEntryNotFoundError as error:
            offline = offline or error
            continue
        except Exception as error:  # noqa: BLE001 - its errors are many, and differ between versions
            raise UserError(f"{what}: {_refusal(error, page, revision, by_hand)}") from None
        if (folder / name).is_file() or (folder / f"{name}.index.json").is_file():
            return folder, name
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else (
        "the hub cannot be reached" if offline else "the hub has none, or cannot be reached")
    command = f"hf download {repository}" + f" --revision {revision}" * bool(revision)
    raise UserError(f"{what}: {' or '.join(files)} of {page} is not in the cache {constants.HF_HUB_CACHE} and "
                    f"{why}; on a machine with network access run {command} and copy models--"
                    f"{repository.replace('/', '--')} from its cache into this one, or {by_hand}")


def _refusal(error: Exception, page: str, revision: str, by_hand: str) -> str:
    """Why the hub refuses, and what to do, as the rest of a sentence."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{page} requires accepting its licence; do that there, and log in (hf auth login, or HF_TOKEN)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{page} does not exist or is private; check the name, or log in (hf auth login, or HF_TOKEN)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{page} has no revision {revision or 'main'}; give a branch, a tag or a commit of it"
    return f"{page} could not be downloaded ({_words(error)}); try again, or {by_hand}"


def _words(error: Any) -> str:
    return " ".join(str(getattr(error, "reason", None) or error).split())[:160] or type(error).__name__
