"""export.py --push-to-hub: a student on the Hugging Face hub, with a model card from its run and its evaluations."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints.by_name import HUB
from checkpoints.frozen import load_frozen
from checkpoints.hugging_face import WEIGHTS
from checkpoints.report import Report, colours
from common.afterwards import trunk_name
from evals.classifier import fingerprint
from evals.results import RESULTS, markdown, read_results
from models.teachers import FrozenEncoder
from runtime.errors import UserError, one_line
from runtime.outputs import check_output_file
from runtime.packages import need_package
from runtime.state import load_json, write_atomic

CARD = "README.md"  # its name on the hub


def check_push(repository: str, target: str, output: Path, force: bool) -> None:
    """Raise :class:`UserError`, before any work, for a name that no repository can have, another format than ``hf:``
    reads, a missing package, or a card that exists."""
    flag = f"--push-to-hub {repository}"
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repository, re.ASCII) or re.search(
            r"(^|/)[.-]|[.-](/|$)|--|\.\.|\.git$", repository):
        raise UserError(f"{flag} is not the name of a repository on the hub; give OWNER/NAME, of letters, digits, "
                        "'-', '_' and '.', such as me/resnet18-coss")
    if target != "safetensors":
        raise UserError(f"{flag} needs --to safetensors, the format that {HUB}{repository} is read in, not --to "
                        f"{target}")
    need_package("huggingface_hub", flag)
    card = card_path(output)
    check_output_file(card, "--output")
    if card.exists() and not force:
        raise UserError(f"--output {output}: the model card beside it, {card}, exists; choose another name, or add "
                        "--force to replace it")


def card_path(output: Path) -> Path:
    """``OUT.md`` beside ``OUT.safetensors``."""
    return output.with_suffix(".md")


def write_card(output: Path, repository: str, encoder: FrozenEncoder, report: Report, folder: Path) -> Path:
    """Write the model card beside ``output``. ``folder``: where the file of ``encoder`` lies, perhaps with
    config.json and evaluation/."""
    path, scored = card_path(output), {report.sha256, _whole(encoder, report, folder)}
    scores = [x for x in read_results(folder / "evaluation" / RESULTS) if x.get("sha256") in scored]
    text = model_card(repository, report, _config(folder), scores)
    return write_atomic(path, lambda file: file.write(text.encode()) and None)


def model_card(repository: str, report: Report, config: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """The card in Markdown. ``config``: the run's config.json, empty if there is none; ``results``: its scores."""
    teacher, starts = config.get("teacher") or {}, config.get("starts") or [{}]
    facts = {
        "architecture": f"{report.arch}, stem {report.stem}", "images": f"{report.image_size} px, in [0, 1], "
        f"normalised by mean {colours(report.mean)} and std {colours(report.std)}",
        "base model": teacher and f"{teacher.get('arch')}, {Path(teacher['file']).name}, SHA-256 {teacher['sha256']}",
        "data": config.get("data") and "/".join(Path(config["data"]).parts[-2:]), "method": config.get("loss"),
        "epochs": config.get("epochs"), "checkpoint": f"SHA-256 {report.sha256}"}
    lines = ["---", "library_name: coss", "pipeline_tag: image-feature-extraction", "tags: [coss, distillation]",
             "# license: (yours to choose; mind that of the teacher and of the data)", "---",
             f"# {repository.partition('/')[2]}", "",
             "An image encoder without a classifier, distilled without labels from a frozen teacher.", "",
             *(f"- {name}: {one_line(str(value))}" for name, value in facts.items() if value), "", "## Use", "",
             "```python", "import coss", f'rows = coss.load("{HUB}{repository}").embed("photos/")', "```", ""]
    if results:
        lines += ["## Scores", ""]
        for one in results:
            lines += [f"`{one_line(str(one.get('command')))}` on {one_line(Path(str(one.get('data'))).name)}", "",
                      markdown(one.get("table") or [one.get("metrics") or {}]), ""]
    if command := starts[-1].get("command"):
        words = [re.sub("^(-[^=/]*=)?/.*", lambda x: (x[1] or "") + Path(x[0]).name, word, flags=re.DOTALL)
                 for word in shlex.split(command)]  # without the folders of this machine
        lines += ["## Command", "", "```", one_line(shlex.join(words)), "```", ""]
    return "\n".join(lines)


def push(repository: str, output: Path, card: Path) -> str:
    """Upload the network and its card in one commit, creating the repository where there is none; its URL.

    Raises :class:`UserError`, which names the local files, if the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    there = f"{output} and {card} are written; push them later by the same command with --force"
    if get_token() is None:
        raise UserError(f"--push-to-hub {repository} needs a token of the hub; log in (hf auth login, or HF_TOKEN); "
                        f"{there}")
    try:
        api = HfApi()
        url = api.create_repo(repository, exist_ok=True)
        files = [CommitOperationAdd(name, str(path)) for name, path in ((WEIGHTS[0], output), (CARD, card))]
        api.create_commit(repository, files, commit_message="Add the network and its card")
    except Exception as error:  # noqa: BLE001 - its errors are many, and differ between versions
        words = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"--push-to-hub {repository}: the hub refused or cannot be reached ({words}); check the name, "
                        f"the token and the connection; {there}") from None
    return str(url)


def _whole(encoder: FrozenEncoder, report: Report, folder: Path) -> str | None:
    """The SHA-256 of the student with its head beside the file of a trunk alone, whose scores are the trunk's too; None
    if there is none, or it is another network."""
    name = next((x.name for x in folder.glob("*.pth") if trunk_name(x.name) == Path(report.file).name), None)
    if name is None:
        return None
    try:
        whole, found = load_frozen(folder / name, report.arch)
    except UserError:
        return None
    return found.sha256 if fingerprint(whole.backbone) == fingerprint(encoder.backbone) else None


def _config(folder: Path) -> Mapping[str, Any]:
    """The run's config.json; empty if there is none that can be read."""
    try:
        found = load_json(folder / "config.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
