"""Fixtures of a small experiment: images, a teacher, its neighbours, a distilled student. Import those that you use.

Each is made once for all workers of a test run, and only read.
"""

import fcntl
import os
import shutil

import pytest

from helpers.images import render_tree
from helpers.scripts import script, well

TEACHER, STUDENT = "shufflenet_small", "squeezenet_small"  # 1,024 and 512 wide, the second without batch norm
COMMON = ["--device", "cpu", "--image-size", "32", "--workers", "0"]


def made_once(tmp_path_factory, name, make):
    """The folder ``name`` of this test run, as ``make(folder)`` left it in the first worker that asked."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, made = base / name, base / f"{name}.made"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a failure left
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return made_once(tmp_path_factory, "tree", lambda folder: render_tree(folder, train=10, val=3))


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder of this worker's."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def teacher_run(tree, tmp_path_factory):
    """A two-epoch MoCo with a tiny queue."""
    return made_once(tmp_path_factory, "teacher-run", lambda folder: well(script(
        "train_teacher.py", "--data", tree / "train", "--arch", TEACHER, "--stem", "cifar", "--output", folder, "-b",
        10, "--bn-parts", 2, "--moco-k", 16, "--epochs", 2, "-p", 1, *COMMON)))


@pytest.fixture(scope="session")
def teacher(teacher_run, work):
    """Its teacher.pth, in a folder where features may be kept."""
    (work / "teacher").mkdir()
    return shutil.copy(teacher_run / "teacher.pth", work / "teacher" / "teacher.pth")


@pytest.fixture(scope="session")
def neighbours(tree, teacher, tmp_path_factory):
    folder = made_once(tmp_path_factory, "neighbours", lambda folder: well(script(
        "compute_knn.py", "mine", "--data", tree / "train", "--weights", teacher, "--output", folder, "--features",
        folder / "features", "--k", 12, "--far", "--workers", 0, "--device", "cpu")))
    return folder / "closek_info.npy"


@pytest.fixture(scope="session")
def distil_flags(tree, teacher_run, neighbours):
    """A training line without --output: 4 anchors with 3 of their 6 nearest, 10 steps an epoch, 2 epochs."""
    return ["--data", tree / "train", "-a", STUDENT, "-k", TEACHER, "--distill", teacher_run / "teacher.pth",
            "--sampler", "cf", "--closek-info", neighbours, "--nearest-k", 3, "--total-k", 6, "-b", 4, "--epochs", 2,
            "-p", 5, "--lr", 0.001, "--image-size", 32, "--device", "cpu"]


@pytest.fixture(scope="session")
def run(distil_flags, tmp_path_factory):
    """A whole run, with a worker and k-NN scores."""
    return made_once(tmp_path_factory, "run", lambda folder: well(script(
        "train_distill.py", *distil_flags, "--output", folder, "--workers", 1, "--knn-every", 1)))
