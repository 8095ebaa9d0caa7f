"""The small data of attack.py: one file of each kind that the scripts read, and of what they should not."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def make_data(folder: Path) -> None:
    """Make it; the parts that scripts of ours write are written by them, in forks."""
    folder.mkdir()
    _images(folder)
    _davis(folder / "davis")
    (folder / "teacher.pth").write_bytes((ROOT / "assets" / "demo_teacher.pth").read_bytes())
    net = "--device cpu -j 0 --data images --image-size 32"
    _script(folder, "train_distill", f"{net} --distill teacher.pth -a shufflenet_v2_x0_5 --stem cifar --output run "
            "--sampler random -b 8 --epochs 1 --epoch-steps 2 --lr 0.01")
    _script(folder, "compute_knn", f"mine {net} --weights teacher.pth --output nn --k 6 --features none")
    _script(folder, "compute_knn", f"cluster {net} --weights teacher.pth --output nn --num-clusters 4 --features none")
    (folder / "packs").mkdir()
    for split in ("train", "val"):
        _script(folder, "pack_dataset", f"--data images/{split} --output packs/{split}.pack -j 0")
    (folder / "train.pack").write_bytes((folder / "packs" / "train.pack").read_bytes())
    with tarfile.open(folder / "images.tar", "w") as tar:
        tar.add(folder / "images", "images")
    _hostile(folder)


def _images(folder: Path) -> None:
    random = np.random.default_rng(0)
    names = []
    for split, count in (("train", 12), ("val", 4)):
        for kind, colour in (("cat", (200, 60, 60)), ("dog", (60, 60, 200))):
            place = folder / "images" / split / kind
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(random.normal(colour, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i:02d}.jpg")
                names.append(f"images/{split}/{kind}/{i:02d}.jpg")
    (folder / "list.txt").write_text("\n".join(names) + "\n")


def _davis(root: Path) -> None:
    random = np.random.default_rng(0)
    for step in range(3):
        mask = np.zeros((32, 48), np.uint8)
        mask[8:20, 8 + step:24 + step] = 1
        for kind, ending, image in (
                ("JPEGImages", "jpg", Image.fromarray(random.integers(0, 255, (32, 48, 3)).astype(np.uint8))),
                ("Annotations", "png", Image.fromarray(mask))):
            path = root / kind / "480p" / "walk" / f"{step:05d}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if ending == "png":
                image.putpalette([x for i in range(256) for x in (i, 255 - i, i)])
            image.save(path)
    listed = root / "ImageSets" / "2017" / "val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("walk\n")


def _script(folder: Path, name: str, line: str) -> None:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.chdir(folder)
            output = os.open(folder.parent / "made.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = [f"{name}.py", *line.split()]
            importlib.import_module(name).main()
            code = 0
        finally:
            if code:
                import traceback
                traceback.print_exc()
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"{name}.py {line} failed:\n" + (folder.parent / "made.log").read_text())


def _hostile(folder: Path) -> None:
    (folder / "text").write_text("hello\n" * 100)
    (folder / "results.jsonl").write_text('{"command": "knn", "metrics": {"top1": 50.0}}\n')
    (folder / "empty").touch()
    (folder / "empty_folder").mkdir()
    os.mkfifo(folder / "fifo")
    here = Path.cwd()
    os.chdir(folder)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    os.chdir(here)
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "unreadable").write_text("x")
    (folder / "unreadable").chmod(0)
    (folder / "unreadable_folder").mkdir()
    (folder / "unreadable_folder").chmod(0)
    ids = (np.arange(24)[:, None] + np.arange(1, 7)) % 24
    np.save(folder / "float.npy", ids + 0.5)
    np.save(folder / "nan.npy", np.full((24, 6), np.nan))
    np.save(folder / "objects.npy", np.array([{"a": 1}] * 24, dtype=object), allow_pickle=True)
    with (folder / "huge.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (10**15, 10**15)})
    Image.new("L", (20_000, 20_000)).save(folder / "huge.jpg", quality=1)
    state = torch.load(folder / "run" / "student.pth", map_location="cpu", weights_only=True)
    weights = {f"module.encoder_q.{key.removeprefix('backbone.')}": value * float("nan") if value.is_floating_point()
               else value for key, value in state["state_dict"].items() if key.startswith("backbone.")}
    torch.save({"state_dict": weights, "arch": "shufflenet_v2_x0_5"}, folder / "nan.pth")
    (folder / os.fsdecode(b"latin\xe9.pth")).write_bytes((folder / "run" / "student.pth").read_bytes())
