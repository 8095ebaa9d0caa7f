"""The script from a student's checkpoint to a score, on rendered images with a much smaller pyramid, and resumed."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import detection_torchvision as script  # noqa: E402

import models.faster_rcnn  # noqa: E402
from runtime.errors import RunPaused, UserError  # noqa: E402

pytest.importorskip("pycocotools", reason="scores boxes; pip install pycocotools")

COLOURS = {3: (230, 20, 20), 7: (20, 20, 230)}  # of each category
IMAGE_SIZE, STEPS, EPOCHS = 64, 6, 2
FLAGS = ["-b", "2", "--epochs", str(EPOCHS), "--lr", "0.01", "--sizes", "64", "--max-size", "64", "-j", "0", "-p", "1",
         "--device", "cpu", "--save-every", "0"]


def make_coco(folder, name, count, seed):
    """Grey noise with a red and a blue rectangle."""
    rng = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        pixels = rng.integers(90, 120, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        images.append({"id": i, "file_name": f"{i}.png", "width": IMAGE_SIZE, "height": IMAGE_SIZE})
        for category, colour in COLOURS.items():
            w, h = rng.integers(20, 32, 2).tolist()
            x, y = rng.integers(0, IMAGE_SIZE - w), rng.integers(0, IMAGE_SIZE - h)
            pixels[y:y + h, x:x + w] = colour
            annotations.append({"id": len(annotations), "image_id": i, "category_id": category, "area": w * h,
                                "bbox": [int(x), int(y), w, h], "iscrowd": 0})
        Image.fromarray(pixels).save(folder / name / f"{i}.png")
    (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(
        {"images": images, "annotations": annotations,
         "categories": [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}]}))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    make_coco(folder, "train", 2 * STEPS, 0)
    make_coco(folder, "val", 3, 1)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Our own layout around a network of torchvision's, and that network."""
    torch.manual_seed(3)
    model = torchvision.models.get_model("resnet_small")
    model.fc = torch.nn.Identity()
    path = tmp_path_factory.mktemp("student") / "student.pth"
    torch.save({"arch": "resnet_small", "stem": "imagenet", "image_size": 64, "mean": [0.5, 0.4, 0.3], "std": [0.2] * 3,
                "state_dict": {f"backbone.{name}": value for name, value in model.state_dict().items()}}, path)
    return path, model


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """A pyramid of 8 channels in place of 256, as everything behind it costs as much as the trunk."""
    monkeypatch.setattr(models.faster_rcnn, "PYRAMID", 8)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["detection_torchvision.py", *map(str, words)])
    script.main()


def trained(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["group"] == "train"]


def test_from_a_student_to_a_score_and_the_same_after_a_stop(tmp_path, monkeypatch, data, student, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(monkeypatch, "--data", data, "--weights", student[0], "--output", whole, *FLAGS)
    losses = trained(whole)
    assert len(losses) == STEPS * EPOCHS
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    out = capsys.readouterr().out
    assert "classes" in out
    assert re.search(r"^red +\d", out, re.MULTILINE)
    result, = map(json.loads, (whole / "results.jsonl").read_text().splitlines())
    assert (result["command"], result["arch"], result["sources"]["test"]["images"]) == ("detection", "resnet_small", 3)
    assert (result["settings"]["lr"], result["settings"]["schedule"]) == (0.01, [1, 2])
    assert set(result["metrics"]) == {"AP", "AP50", "AP75", "APs", "APm", "APl"}
    assert 0 <= result["metrics"]["AP"] <= result["metrics"]["AP50"] <= 100
    assert [row["class"] for row in result["table"]] == ["all", "red", "blue"]
    assert (whole / "detection.md").read_text().startswith("| class | AP ")

    # Stopped in the middle of the second epoch, and started again with the images named in the other way.
    honest, seen = script.check_boxes, []

    def stop_at(batch):
        seen.append(batch)
        if len(seen) == STEPS + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        honest(batch)

    with monkeypatch.context() as patch:
        patch.setattr(script, "check_boxes", stop_at)
        with pytest.raises(RunPaused):
            run(monkeypatch, "--data", data, "--weights", student[0], "--output", parts, *FLAGS)
    assert not (parts / "results.jsonl").exists()
    run(monkeypatch, "--data", data, "--weights", student[0], "--output", parts, *FLAGS)
    assert "resuming from" in capsys.readouterr().out
    assert trained(parts) == losses
    ours, theirs = (torch.load(folder / "detector.pth", weights_only=True) for folder in (whole, parts))
    assert ours["classes"] == ["red", "blue"]
    assert all(torch.equal(value, theirs["state_dict"][name]) for name, value in ours["state_dict"].items())


def test_it_starts_from_the_students_weights_and_normalisation(student):
    args = script.parse_args(["--data", "d", "--weights", str(student[0]), "--output", "o"])
    detector, identity, _ = script.open_detector(args, classes=2)
    body = detector.backbone.body.state_dict()
    for name, value in student[1].state_dict().items():
        assert torch.equal(body.pop(name), value)
    assert not body
    assert (detector.transform.image_mean, detector.transform.image_std) == ([0.5, 0.4, 0.3], [0.2] * 3)
    assert identity["arch"] == "resnet_small"


def test_the_rate_climbs_and_falls():
    rate = script.rate_of(0.02, [8, 11])
    assert rate(0, 0, 5000) == pytest.approx(2e-5)
    assert rate(0, 499, 5000) == pytest.approx(0.02 * 0.5)
    assert rate(0, 1000, 5000) == rate(7, 4999, 5000) == 0.02
    assert rate(0, 50, 100) == pytest.approx(0.02 * 0.501)  # a short epoch is the whole climb
    assert rate(8, 0, 5000) == pytest.approx(0.002)
    assert rate(11, 0, 5000) == pytest.approx(0.0002)


@pytest.mark.parametrize("words", [[], ["--data", "d", "--train", "a", "b"], ["--train", "a", "b"],
                                   ["--data", "d", "--test", "a", "b"]])
def test_data_is_given_in_one_way(words):
    with pytest.raises(UserError, match="give --data DIR, or --train JSON IMAGES and --test JSON IMAGES"):
        script.open_data(script.parse_args(["--weights", "w", "--output", "o", *words]))


def test_files_given_one_by_one_are_the_same_data(data):
    given = [word for role, part in (("train", "train"), ("test", "val"))
             for word in (f"--{role}", str(data / f"annotations/instances_{part}.json"), str(data / part))]
    one = script.open_data(script.parse_args(["--weights", "w", "--output", "o", *given]))
    other = script.open_data(script.parse_args(["--weights", "w", "--output", "o", "--data", str(data)]))
    assert [source.fingerprint() for source in one] == [source.fingerprint() for source in other]


def test_untrained_weights_need_an_architecture():
    with pytest.raises(UserError, match="needs --arch"):
        script.open_detector(script.parse_args(["--data", "d", "--weights", "untrained", "--output", "o"]), 2)


def test_every_flag_is_explained_and_read(monkeypatch):
    files = "scripts/detection_torchvision.py", "common/cli.py", "common/networks.py"
    source = "".join((ROOT / name).read_text() for name in files)
    args = script.parse_args(["--weights", "w", "--output", "o"])
    unread = [name for name in vars(args) if f"args.{name}" not in source and f'"{name}"' not in source
              and name not in args.declared]  # arguments of what they are declared for, read by name
    assert not unread
    found = []
    monkeypatch.setattr(script.cli.Parser, "parse_args", lambda self, argv: found.append(self))
    script.parse_args([])
    assert all((action.help or "").strip() for action in found[0]._actions)
    assert "--sizes" in found[0].format_help()
