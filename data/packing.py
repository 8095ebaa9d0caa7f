"""Writing a packed file: in parallel, and resumable; the file appears only once it is complete."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import signal
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data.images import BadImage, limit_pixels, most_pixels, open_rgb
from data.packed import RECORD, PackedSource, is_packed
from data.packing_part import Encoded, Recipe, UnfinishedPack
from data.sources import ImageSource
from runtime.errors import UserError
from runtime.numbers import amount

MAX_JPEG_SIDE = 65_500  # pixels; the limit of libjpeg
CHUNK = 64  # images per task of a worker
MAX_RECORD = 2**31 - 2**16  # bytes that one read can return


@dataclass
class Packed:
    """The result of pack(). bad: (location, reason) of each image left out. resumed: images packed by earlier calls."""

    path: Path
    images: int = 0
    size: int = 0
    resumed: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)


def pack(
    source: ImageSource,
    path: Path,
    recipe: Recipe,
    workers: int,
    on_bad_image: str = "error",
    progress: Callable[[Iterable[Encoded], int, int], Iterable[Encoded]] | None = None,
) -> Packed:
    """Write `source` into one file at `path`, with the images in the same order and under the same names.

    The file appears once it is complete. Until then PATH.part and PATH.part.index beside it hold what is done, and
    the same call resumes from there. workers 0: encode in this process. on_bad_image 'error' stops at an image that
    cannot be decoded; 'skip' leaves it out, so that the images after it get other numbers and the fingerprint changes.
    progress(remaining images, number done, number of all) wraps the iteration, for a progress bar.
    Raises UserError for an unreadable image, a full disk, a path that is taken, or another unfinished pack.
    """
    path = Path(path)
    found = _already_there(source, path, recipe)
    if found:
        _refuse_gaps(found, path, on_bad_image)
        return found
    part = UnfinishedPack(source, path, recipe)
    try:
        done = Packed(path, resumed=part.done)
        if not part.done:
            _check_room(source, path, recipe)
        encoded = _encode_all(source, recipe, range(part.done, len(source)), workers)
        wrapped = progress(encoded, part.done, len(source)) if progress else encoded
        for image in wrapped:
            if image.content is None and on_bad_image == "error":
                raise UserError(f"{source.location(part.done)} could not be packed ({image.reason}); replace it and "
                                "resume with the same command, or leave out such images with --on-bad-image skip")
            part.add(image)
        done.bad = _left_out(source, part.skipped())
        _refuse_gaps(done, part.data_path, on_bad_image)
        done.images, done.size = part.finish(path)
    except OSError as error:
        raise UserError(f"--output {path} could not be written ({error.strerror or error}) after {part.done:,} of "
                        f"{len(source):,} images; free some space and repeat the same command to resume") from None
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps for lack of memory; repeat the command with a smaller "
                        f"--workers to resume after {part.done:,} of {len(source):,} images") from None
    finally:
        part.close()
    return done


def encode(source: ImageSource, i: int, recipe: Recipe) -> Encoded:
    """Image i of a source in the form to store. Every mode decodes the image, to detect unreadable ones."""
    try:
        content = source.encoded(i)
        image = source.open(i) if content is None else open_rgb(io.BytesIO(content))
        size = image.size
        stored, small = size, shrink(image, recipe.short_side)
        if recipe.mode == "raw":
            content, stored = small.tobytes(), small.size
        elif recipe.mode == "jpeg" and small is not image:
            if max(small.size) > MAX_JPEG_SIDE:  # Pillow would try again and again, and libjpeg say so each time
                raise ValueError(f"a side of a JPEG has at most {MAX_JPEG_SIDE:,}")
            content, stored = _saved(small, "JPEG", quality=recipe.quality), small.size
        elif content is None:  # an image in memory has no file, so make a lossless one
            content = _saved(image, "PNG")
    except BadImage as error:
        return Encoded(None, reason=str(error))
    except (OSError, ValueError, MemoryError) as error:  # decoding worked, storing failed
        width, height = image.size
        return Encoded(None, reason=f"its {width:,} x {height:,} pixels could not be stored as {recipe.mode} "
                                    f"({error}); give --mode original, or leave it out")
    if not 0 < len(content) <= MAX_RECORD:
        return Encoded(None, reason=f"its {len(content):,} bytes are outside the 1 to {MAX_RECORD:,} of a record")
    return Encoded(content, size, stored, zlib.crc32(content))


def shrink(image: Image.Image, short_side: int | None) -> Image.Image:
    """The image resized so that its shorter side has short_side pixels (antialiased, bicubic); unchanged if that would
    enlarge it."""
    width, height = image.size
    if short_side is None or min(width, height) <= short_side:
        return image
    scale = short_side / min(width, height)
    return image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ---- worker processes

_job: tuple[ImageSource, Recipe] | None = None


def _start_worker(source: ImageSource, recipe: Recipe, most: int) -> None:
    global _job
    limit_pixels(most)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _job = source, recipe


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # once it is gone, nothing else would end this process
    os._exit(1)


def _encode_chunk(indices: range) -> list[Encoded]:
    source, recipe = _job
    return [encode(source, i, recipe) for i in indices]


def _encode_all(source: ImageSource, recipe: Recipe, indices: range, workers: int) -> Iterator[Encoded]:
    """The encoded images at ``indices``, in order. Only a few chunks are in flight at a time, to bound memory."""
    if not workers:
        yield from (encode(source, i, recipe) for i in indices)
        return
    chunks = (indices[first : first + CHUNK] for first in range(0, len(indices), CHUNK))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(), _start_worker, (source, recipe, most_pixels()))
    under_way: deque[Future] = deque()
    try:
        for chunk in chunks:
            under_way.append(pool.submit(_encode_chunk, chunk))
            if len(under_way) > 2 * workers:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _already_there(source: ImageSource, path: Path, recipe: Recipe) -> Packed | None:
    """The finished file, if `path` is this very pack; None if nothing is there. Raises UserError for anything else."""
    if not path.exists():
        return None
    if path.is_file() and is_packed(path):
        with contextlib.suppress(UserError):
            there = PackedSource(path)
            same = {key: there.meta.get(key) for key in asdict(recipe)} == asdict(recipe)
            if same and there.meta.get("source_fingerprint", there.fingerprint()) == source.fingerprint():
                kept = set(there.names) if len(there) < len(source) else None
                missing = [i for i, name in enumerate(source.names) if name not in kept] if kept else []
                return Packed(path, len(there), path.stat().st_size, len(there), _left_out(source, missing))
    raise UserError(f"--output {path} exists, but is not a pack of these images with these settings; remove it or "
                    "choose another name")


def _left_out(source: ImageSource, images: list[int]) -> list[tuple[str, str]]:
    return [(source.shown(i), encode(source, i, Recipe()).reason) for i in images]


def _refuse_gaps(done: Packed, path: Path, on_bad_image: str) -> None:
    """Raise UserError if an earlier call left out images and this one would not."""
    if done.bad and on_bad_image == "error":
        raise UserError(f"{path} was started with --on-bad-image skip and leaves out {done.bad[0][0]}; give that flag "
                        "again, or remove the file")


def _check_room(source: ImageSource, path: Path, recipe: Recipe) -> None:
    """Raise UserError if the disk has too little space, estimated from at most 32 images spread over the set."""
    spread = np.unique(np.linspace(0, len(source) - 1, 32).astype(int))
    sample = [encode(source, int(i), recipe) for i in spread]
    sizes = [len(image.content) for image in sample if image.content is not None]
    if not sizes:
        return
    needed = len(source) * (sum(sizes) / len(sizes) + RECORD.itemsize * 2) + len(source.names.block)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(f"--output {path} will need about {amount(needed)}, but only {amount(free)} are free "
                        "there; choose another disk, or a smaller --short-side or --mode")
