"""evaluate.py overlap: which features are compared, what is left behind, and what is said of bad input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import evaluate
from common.evaluate_overlap import common_space, heads_of, students_args
from common.evaluation import student_names
from models.backbones import build_backbone
from models.heads import build_head, build_heads
from runtime.device import Process
from runtime.errors import UserError

ALONE = Process(0, 1, torch.device("cpu"))


def head(*widths):
    return build_head("wide", *widths) if widths[0] != 5 else nn.Sequential(nn.Linear(*widths))


def test_what_is_compared():
    teacher, narrow, wide = torch.randn(6, 8), torch.randn(6, 5), torch.randn(6, 8)
    own = [head(8, 4)]
    target, projected, how = common_space(teacher, narrow, own, [head(5, 8)])
    assert (target is teacher, projected.shape, how) == (True, (6, 8), "student's head, teacher's trunk")
    target, projected, how = common_space(teacher, wide, own, [head(8, 4)])
    assert (target.shape, projected.shape, how) == ((6, 4), (6, 4), "both heads")
    assert target.allclose(own[0](teacher))
    several = [head(8, 4), head(8, 8)]                       # of a sum of losses
    assert common_space(teacher, wide, own, several)[1].allclose(several[1](wide))
    assert common_space(teacher, wide, own, [])[::2] == (teacher, "both trunks")
    assert common_space(teacher, wide, [], [head(8, 4)])[1] is wide
    assert common_space(teacher, narrow, own, []) == (None, None, "no common width")
    assert common_space(teacher, narrow, own, [head(8, 8)]) == (None, None, "no common width")  # not of this trunk


def test_the_heads_in_a_file(tmp_path):
    args = evaluate.parse_args(["overlap", "--data", "d", "--teacher", "t", "--weights", "s"])
    backbone = {f"backbone.{k}": v for k, v in build_backbone("squeezenet_small", image_size=64).state_dict().items()}

    def widths(module):
        path = tmp_path / "student.pth"
        torch.save({"state_dict": {**backbone, **{f"proj_head.{k}": v for k, v in module.state_dict().items()}}}, path)
        return [[layer.out_features for layer in x if isinstance(layer, nn.Linear)]
                for x in heads_of(str(path), None, args)]

    assert widths(nn.Identity()) == []
    assert widths(nn.Linear(512, 7)) == [[7]]
    assert widths(build_head("projection", 512, 9)) == [[2048, 9]]
    wanted = [("projection", "trunk"), ("mlp", "head"), ("linear", "trunk"), ("none", None)]
    assert widths(build_heads(wanted, 512, {"trunk": 9, "head": 4, None: 512})) == [[2048, 9], [512, 4], [9]]
    assert heads_of("untrained", None, args) == []


def test_names():
    assert student_names(["runs/a/student.pth", "runs/b/student.pth", "c/resnet18.pth", "student.pth"], None) == [
        "a", "b", "resnet18", "student"]
    assert student_names(["a/student.pth", "b/a/student.pth"], None) == ["1: a", "2: a"]
    assert student_names(["a", "b"], ["x", "y"]) == ["x", "y"]
    for wrong in (["x"], ["x", "x"]):
        with pytest.raises(UserError, match="--names"):
            student_names(["a", "b"], wrong)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images, a teacher, a copy of it as a student, and a narrower student with its projection."""
    root = tmp_path_factory.mktemp("overlap")
    generator = np.random.default_rng(0)
    (root / "val").mkdir()
    for i in range(14):
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / "val" / f"{i}.png")
    torch.manual_seed(0)
    networks = {arch: build_backbone(arch, image_size=32) for arch in ("shufflenet_small", "squeezenet_small")}
    for folder, arch, proj in (("teacher", "shufflenet_small", nn.Identity()),
                               ("narrow", "squeezenet_small", build_head("projection", 512, 1024))):
        state = {f"backbone.{k}": v for k, v in networks[arch].state_dict().items()}
        state |= {f"proj_head.{k}": v for k, v in proj.state_dict().items()}
        (root / folder).mkdir()
        torch.save({"state_dict": state, **networks[arch].spec.record()}, root / folder / "student.pth")
    return root


def overlap(root, *more, output="out", k=("--k", "1", "5")):
    teacher = str(root / "teacher" / "student.pth")
    args = evaluate.parse_args(["overlap", "--data", str(root / "val"), "--teacher", teacher, "--weights", teacher,
                                str(root / "narrow" / "student.pth"), "--output", str(root / output), "--device", "cpu",
                                "--workers", "0", *k, *more])
    return evaluate.COMMANDS["overlap"].run(args, ALONE)


def test_students_side_by_side(files, capsys):
    record = overlap(files)
    same, narrow = record["metrics"]["teacher"], record["metrics"]["narrow"]
    assert same["shared"] == {1: 100, 5: 100}
    assert (same["trustworthiness"][5], same["cka"], same["row_cosine"]) == pytest.approx((1, 1, 1))
    assert narrow["shared"][5] < 100
    assert -1 < narrow["row_cosine"] < 1
    assert record["compared"] == {"teacher": "both trunks", "narrow": "student's head, teacher's trunk"}
    assert [net["arch"] for net in record["networks"]] == ["shufflenet_small"] * 2 + ["squeezenet_small"]
    out = capsys.readouterr().out
    assert "narrow" in out
    assert "overlap.png" in out
    assert Image.open(files / "out" / "overlap.png").width > 800
    assert "| narrow |" in (files / "out" / "overlap.md").read_text()
    line = json.loads((files / "out" / "results.jsonl").read_text())
    assert line["metrics"]["narrow"]["shared"]["5"] == narrow["shared"][5]
    kept = sorted((files / "out" / "features").glob("*.npy"))
    assert len(kept) == 2  # the teacher is its own student
    before = [path.stat().st_mtime_ns for path in kept]
    again = overlap(files, "--picture", "none")
    assert again["metrics"] == record["metrics"]
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_one_arch_for_files_that_tell_theirs_and_one_that_does_not(files):
    teacher, narrow = (str(files / x / "student.pth") for x in ("teacher", "narrow"))
    (files / "other.pth").write_bytes(b"?")

    def archs(*weights):
        args = evaluate.parse_args(["overlap", "--data", "x", "--teacher", teacher, "--arch", "shufflenet_small",
                                    "--stem", "cifar", "--weights", *weights])
        return [(one.arch, one.stem) for one in (students_args(args, file) for file in weights)]

    own, given = (None, "cifar"), ("shufflenet_small", "cifar")
    assert archs(teacher, narrow, str(files / "other.pth")) == [own, own, given]
    assert archs("untrained", narrow) == [given, (None, None)]
    assert archs(narrow) == [given]  # of a single file it is what to expect


def test_bad_input(files):
    with pytest.raises(UserError, match=r"--k 7 of 14 images: .*fewer than half"):
        overlap(files, k=("--k", "7"))
    with pytest.raises(UserError, match="--names gives 1 names for 2 files"):
        overlap(files, "--names", "x")
    (files / "link.png").symlink_to(files / "teacher" / "student.pth")
    for name, words in (("teacher/student.pth", r"is written as \.png"), ("link.png", "a file that is read here")):
        with pytest.raises(UserError, match=words):
            overlap(files, "--picture", str(files / name))
    with pytest.raises(UserError, match="--teacher"):
        overlap(files, "--teacher", str(files / "none.pth"))
    with pytest.raises(UserError, match=r"--weights .*none.pth is not a file"):
        overlap(files, "--weights", str(files / "teacher" / "student.pth"), str(files / "none.pth"), output="early")
    assert not (files / "early").exists()                    # refused before features were made


def test_the_picture_without_matplotlib(files, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    overlap(files, output="bare")
    assert "pip install matplotlib" in capsys.readouterr().out
    with pytest.raises(UserError, match="pip install matplotlib"):
        overlap(files, "--picture", str(files / "x.png"))
