"""inspect_checkpoint.py as it is run: what it prints, its JSON, its exit code, and the table in the docs."""

import json
from pathlib import Path

import pytest
import torch
from helpers.scripts import in_this_process
from torchvision import models

from checkpoints.report import Report
from checkpoints.safe_load import file_sha256
from data.demo import write_demo
from inspect_checkpoint import as_text, layout_table

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"file", "ok", "layout", "arch", "branch", "matched", "missing", "unexpected", "dropped", "sha256", "mean",
        "std", "error"}


def inspect(*arguments):
    result = in_this_process("inspect_checkpoint.py", *arguments)
    assert "Traceback" not in result.err, result.err
    return result


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A MoCo file with both encoders, a ResNet-34 of which a block is missing, a page, and a torchvision file whose
    name carries its hash."""
    folder = tmp_path_factory.mktemp("files")
    state = models.resnet18().state_dict()
    trunk = {k: v for k, v in state.items() if not k.startswith("fc.")}
    both = {f"module.encoder_{x}.{k}": v for x in "qk" for k, v in trunk.items()}
    head = {f"module.encoder_q.fc.{i}.{n}": torch.randn(4, 4)[:, 0] if n == "bias" else torch.randn(4, 4)
            for i in (0, 2) for n in ("weight", "bias")}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": both | head | {"module.queue": torch.zeros(2, 2)}},
               folder / "moco.pth")
    short = {k: v for k, v in models.resnet34().state_dict().items() if not k.startswith("layer3.5.")}
    torch.save(short, folder / "short.pth")
    (folder / "page.pth").write_text("<!DOCTYPE html><html></html>")
    torch.save(state, folder / "named.pth")
    named = folder / f"resnet18-{file_sha256(folder / 'named.pth')[:8]}.pth"
    (folder / "named.pth").rename(named)
    return {"moco": folder / "moco.pth", "short": folder / "short.pth", "page": folder / "page.pth", "named": named}


def test_json_gives_one_object_a_file_and_the_exit_code_says_whether_all_are_complete(files):
    result = inspect(*files.values(), folder := files["page"].parent / "nowhere.pth", "--json")
    assert result.rc == 2
    objects = [json.loads(line) for line in result.out.splitlines()]
    assert [x["file"] for x in objects] == [*map(str, files.values()), str(folder)]
    assert all(x.keys() >= KEYS for x in objects)
    moco, short, page, named, nowhere = objects
    assert [x["ok"] for x in objects] == [True, False, False, True, False]
    assert (moco["layout"], moco["arch"], moco["branch"], moco["branches"], moco["epoch"]) == (
        "MoCo", "resnet18", "encoder_q", ["encoder_k"], 200)
    assert moco["matched"] == 120
    assert moco["dropped"] == {"encoder_q.fc.": 4, "encoder_k.": 120, "queue": 1}
    assert moco["head"] == "Linear(4, 4), ReLU, Linear(4, 4)"
    assert moco["sha256"] == file_sha256(files["moco"])
    assert moco["error"] is None
    assert "nearest is resnet34" in short["error"]
    assert "web page" in page["error"]
    assert page["layout"] is None
    assert "agree" in named["published"]
    assert "not a file" in nowhere["error"]


def test_text_for_a_person(files):
    result = inspect(files["moco"])
    assert result.rc == 0, result.err
    for words in ("MoCo in state_dict, branch encoder_q", "other branches  encoder_k",
                  "resnet18, stem imagenet, 224 px", "complete: 120 tensors", "encoder_k. (another branch)",
                  "mean 0.485 0.456 0.406"):
        assert words in result.out
    assert "encoder_q" in inspect(files["moco"], "--branch", "teacher").out
    assert inspect(files["moco"], "--branch", "teacher").rc == 2


def test_arch_flag_shows_the_difference_from_that_one(files):
    report = json.loads(inspect(files["short"], "--arch", "resnet34", "--json").out)
    assert len(report["missing"]) == 10  # two convolutions, two batch norms of four
    assert all(name.startswith("layer3.5.") for name in report["missing"])
    wrong = json.loads(inspect(files["moco"], "--arch", "resnet34", "--json").out)
    assert wrong["missing"]
    assert "it fits resnet18" in wrong["error"]


def test_a_network_of_random_weights_is_told_from_a_trained_one(tmp_path):
    write_demo(tmp_path / "demo", train_per_class=25, test_per_class=1)
    data = tmp_path / "demo" / "train"
    teacher = json.loads(inspect(ROOT / "assets" / "demo_teacher.pth", "--data", data, "-j", 0, "--json").out)
    assert teacher["sanity"]["verdict"] == "it has learnt"
    assert teacher["sanity"]["percent"] > teacher["sanity"]["percent_fresh"] + 20
    torch.manual_seed(7)
    torch.save({"image_size": 64, "state_dict": models.squeezenet1_1().state_dict()}, tmp_path / "random.pth")
    for images in (data, min(data.iterdir())):  # with labels, without
        random = json.loads(inspect(tmp_path / "random.pth", "--data", images, "-j", 0, "--json").out)
        assert random["ok"]
        assert "images are too few to tell" in random["sanity"]["verdict"]
        assert "hardly differ" in random["sanity"]["verdict"]


def test_nothing_to_inspect_is_said():
    result = inspect()
    assert result.rc == 2
    assert "at least one FILE" in result.err


def test_the_docs_hold_the_codes_own_table():
    assert layout_table() in (ROOT / "docs" / "CHECKPOINTS.md").read_text()


def test_escape_codes_in_names_do_not_reach_the_terminal(tmp_path):
    report = Report(file="a\x1b[31m.pth", branches=["b\x1b]0;title\x07"], missing=["c\x9b2J"], error="d\r\x08")
    text = as_text(report, "e\x1b[H", None)
    assert all(letter.isprintable() for letter in text.replace("\n", ""))
    assert "a?[31m.pth" in text
