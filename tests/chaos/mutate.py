#!/usr/bin/env python
"""Change a few bytes of each kind of file that the scripts read, many times, and count what becomes of it.

    python tests/chaos/mutate.py --times 300
    python tests/chaos/mutate.py --times 300 --only neighbours "student.pth"

Refused is a sentence; equal is the same content as before, or features that were made again; silent is another content
without a word, traceback any other exception, hung more than 20 seconds. Formats without a checksum of their own
(PyTorch's before 1.6, safetensors, .npy and text of others) cannot know a changed number. Ends with 1 if there is a
traceback, a hang, or a silent change of a format that has a checksum.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from checkpoints.reader import read_checkpoint
from data.clusters import load_clusters, save_clusters
from data.neighbours import load_neighbours, place_neighbours
from evals.results import add_result, read_results
from models.backbones import build_backbone
from runtime.device import Process
from runtime.errors import UserError
from runtime.store import digest, load_checkpoint, save_checkpoint
from search.features import Keep, extract

SECONDS = 20
INFO = {"fingerprint": "f" * 64, "source": "x", "teacher_sha256": "a" * 64, "teacher_arch": "resnet18"}
IDS = (np.arange(200)[:, None] + np.arange(1, 9)) % 200
Case = tuple[Path, Callable[[], Any], bool]  # the file, what reads it, and whether it has a checksum


class Hung(BaseException):
    """Raised by the alarm; nothing catches it."""


def networks(folder: Path) -> Iterator[tuple[str, Case]]:
    """Files of a small network, in each format of weights."""
    trunk = build_backbone("shufflenet_v2_x0_5", "cifar", 32)
    content = {"arch": "shufflenet_v2_x0_5", "epoch": 3, "state_dict": {f"module.encoder_q.{k}": v.clone() for k, v in
                                                                      trunk.state_dict().items()}}

    def reader(path: Path) -> Callable[[], Any]:
        def read() -> str:
            read_checkpoint(path).load_into(trunk)
            return digest(dict(trunk.state_dict()))
        return read

    for name, options in (("MoCo .pth", {}), ("MoCo .pth before 1.6", {"_use_new_zipfile_serialization": False})):
        path = folder / f"{len(options)}.pth"
        torch.save(content, path, **options)
        yield name, (path, reader(path), not options)
    path = save_checkpoint({"arch": "shufflenet_v2_x0_5", "stem": "cifar", "image_size": 32, "state_dict": {
        f"backbone.{k}": v.clone() for k, v in trunk.state_dict().items()}}, folder / "student.pth")
    yield "student.pth", (path, reader(path), True)
    with contextlib.suppress(ImportError):
        from safetensors.torch import save_file
        save_file(dict(trunk.state_dict()), folder / "a.safetensors")
        yield ".safetensors", (folder / "a.safetensors", reader(folder / "a.safetensors"), False)


def tables(folder: Path) -> Iterator[tuple[str, Case]]:
    """Neighbours, clusters, kept features, a run's files."""
    np.save(folder / "rows.npy", IDS)
    mined = place_neighbours(folder / "rows.npy", folder, "closek_info", INFO, [(0, 200, zlib.crc32(IDS.tobytes()))])
    original = folder / "original.npy"
    np.save(original, IDS)

    def neighbours(path: Path) -> Callable[[], Any]:
        return lambda: np.asarray(load_neighbours(path, INFO["fingerprint"], 200, 8)[0]).tobytes()
    yield "neighbours", (mined, neighbours(mined), True)
    yield "their .json", (mined.with_suffix(".json"), neighbours(mined), True)
    yield "the original's neighbours", (original, neighbours(original), False)
    labels = np.arange(200) % 7
    path = save_clusters(folder, labels, 7, INFO)
    yield "clusters", (path, lambda: load_clusters(path, INFO["fingerprint"], 200)[0].tobytes(), True)
    values = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    keep = Keep(folder, {"of": "x"}, 4)

    def features() -> bytes:
        def loader(indices: range) -> Any:
            return [((values[list(indices)],), torch.tensor(list(indices)), [])]
        return extract(torch.nn.Identity(), loader, 50, Process(0, 1, torch.device("cpu")), "x", lambda _: None,
                       keep).numpy().tobytes()
    features()
    yield "kept features", (keep.path, features, True)
    yield "the record of features", (keep.path.with_suffix(".json"), features, True)
    state = {"epoch": 1, "step": 2, "steps": 3, "skipped": 0, "random": [1, 2], "model": {"w": torch.randn(100)}}
    saved = save_checkpoint(state, folder / "checkpoint.pth")
    yield "checkpoint.pth", (saved, lambda: digest(load_checkpoint(saved)), True)
    for number in range(20):
        results = add_result(folder, {"number": number, "name": "x"})
    yield "results.jsonl", (results, lambda: str(read_results(results)), False)


def mutate(good: bytes, random: np.random.Generator) -> bytes:
    """``good`` with one to three changes, half of them near its ends, where formats say what they are."""
    content = bytearray(good)
    for _ in range(random.integers(1, 4)):
        size = max(1, len(content))
        place = int(random.integers(size))
        if random.random() < 0.5:
            place = place % min(size, 2000) if random.random() < 0.5 else size - 1 - place % min(size, 2000)
        length = int(random.integers(1, 40))
        kind = random.integers(6)
        if kind < 3 and content:
            content[place] = content[place] ^ (1 << random.integers(8)) if kind else random.integers(256)
        elif kind == 3:
            del content[place:place + (length if random.random() < 0.8 else size)]
        elif kind == 4:
            content[place:place] = content[place:place + length]
        else:
            content[place:place + length] = bytes(length)
    return bytes(content)


def outcome(read: Callable[[], Any], expected: Any) -> str:
    """What comes of reading the changed file."""
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return "equal" if read() == expected else "silent"
    except UserError:
        return "refused"
    except Hung:
        return "hung"
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return f"traceback {type(error).__name__}: {error}"[:200]
    finally:
        signal.alarm(0)


def attack(case: Case, times: int, seed: int) -> Counter[str]:
    """Outcomes of so many mutations of one file, which is as before afterwards."""
    path, read, _ = case
    there = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    expected, random, found = read(), np.random.default_rng(seed), Counter()
    for _ in range(times):
        path.write_bytes(mutate(there[path], random))
        found[outcome(read, expected)] += 1
        for file, content in there.items():
            if not file.exists() or file.read_bytes() != content:
                file.write_bytes(content)
    return found


def alarm(*_: Any) -> None:
    """The handler of SIGALRM."""
    raise Hung


def main() -> int:
    """A row for each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=300, metavar="N", help="changes of each file; default 300")
    parser.add_argument("--seed", type=int, default=0, help="of the changes; default 0")
    parser.add_argument("--only", nargs="+", metavar="FORMAT", help="these alone; default: all")
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, alarm)
    torch.manual_seed(args.seed)
    bad = 0
    print("| format | changes | refused | equal | silent | traceback | hung |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for make in (tables, networks):
            place = Path(folder) / make.__name__
            place.mkdir()
            for name, case in make(place):
                if args.only and name not in args.only:
                    continue
                found = attack(case, args.times, args.seed)
                broken = {what: count for what, count in found.items() if what.startswith("traceback")}
                print(f"| {name} | {args.times} | {found['refused']} | {found['equal']} | {found['silent']} | "
                      f"{sum(broken.values())} | {found['hung']} |", flush=True)
                for what, count in broken.items():
                    print(f"{count} x {what}", file=sys.stderr)
                bad += sum(broken.values()) + found["hung"] + (found["silent"] if case[2] else 0)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
