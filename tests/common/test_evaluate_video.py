"""evaluate.py video on a tiny DAVIS: layout, scores, resuming, masks that the official toolkit reads, bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import VisionTransformer

import evaluate
from common import evaluate_video as video
from common.evaluate_video import _kept
from evals.sets.davis import open_davis
from models.backbones import build_backbone
from runtime.device import Process
from runtime.errors import UserError

ALONE = Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    """Two videos of four frames of 64 x 96 pixels, in which two squares move; a network."""
    root = tmp_path_factory.mktemp("davis")
    generator = np.random.default_rng(0)
    for name in ("run", "walk"):
        for step in range(4):
            pixels, mask = generator.integers(0, 60, (64, 96, 3)), np.zeros((64, 96), dtype=np.uint8)
            for number, (top, left) in enumerate(((8 + 2 * step, 8 + 4 * step), (36, 60 - 4 * step)), 1):
                pixels[top:top + 20, left:left + 24, number] += 180
                mask[top:top + 20, left:left + 24] = number
            mask[:, 95] = 255                                # belongs to nothing
            pixels = pixels.astype(np.uint8)
            for folder, extension, array in (("JPEGImages", "jpg", pixels), ("Annotations", "png", mask)):
                path = root / folder / "480p" / name / f"{step:05d}.{extension}"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(array)
                if folder == "Annotations":
                    image.putpalette([x for i in range(256) for x in (i, 255 - i, i)])
                image.save(path)
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("run\nwalk\n")
    torch.manual_seed(0)
    backbone = build_backbone("squeezenet1_1", image_size=64)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in backbone.state_dict().items()},
                **backbone.spec.record()}, root / "net.pth")
    return root


def run(davis, *more):
    args = evaluate.parse_args(["video", "--data", str(davis), "--weights", str(davis / "net.pth"), "--output",
                                str(davis / "out"), "--device", "cpu", "--short-side", "64", *map(str, more)])
    return evaluate.COMMANDS["video"].run(args, ALONE)


def test_scores_masks_and_what_is_finished(davis, monkeypatch, capsys):
    record = run(davis, "--masks", davis / "masks")
    metrics = record["metrics"]
    assert set(metrics) == {"J&F mean", *(f"{x} {y}" for x in "JF" for y in ("mean", "recall", "decay"))}
    assert 20 < metrics["J mean"] <= 100
    assert record["map"] == {"stage": "features.12", "stride": 8}
    assert "4 objects in 2 videos" in capsys.readouterr().out
    assert set(record["videos"]) == {"run", "walk"}

    found = {name: [] for name in "JF"}                      # again, from the masks that were written
    for sequence in open_davis(davis):
        files = sorted((davis / "masks" / sequence.name).glob("*.png"))
        assert [path.name for path in files] == [f"{i:05d}.png" for i in range(4)]
        assert Image.open(files[0]).mode == "P"
        for number in (1, 2):
            for path, truth in list(zip(files, sequence.masks, strict=True))[1:-1]:
                ours, theirs = (np.array(Image.open(x)) == number for x in (path, truth))
                found["J"].append((ours & theirs).sum() / (ours | theirs).sum())
    assert metrics["J mean"] == pytest.approx(100 * np.mean(found["J"]))

    (place,) = (davis / "out" / "video").iterdir()
    assert sorted(path.name for path in place.glob("*.json")) == ["run.json", "walk.json"]
    (place / "walk.json").unlink()                           # as after a kill: the other is not done again
    done = []
    monkeypatch.setattr(video, "scores", lambda sequence, *more, real=video.scores: done.append(sequence.name) or real(
        sequence, *more))
    assert run(davis)["metrics"] == metrics
    assert done == ["walk"]
    assert run(davis, "--top-k", 2)["metrics"] != metrics    # other settings are another result
    assert done == ["walk", "run", "walk"]
    assert run(davis, "--subset", 0.5)["sources"]["frames"]["images"] == 4
    assert json.loads((davis / "out" / "results.jsonl").read_text().splitlines()[0])["metrics"] == metrics


def test_other_files_are_not_given_the_scores_of_those_before(davis, tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(davis, here)
    shutil.copytree(davis, there)
    done, out = [], ["--output", tmp_path / "out"]
    monkeypatch.setattr(video, "scores", lambda sequence, *more, real=video.scores: done.append(sequence.name) or real(
        sequence, *more))
    first = run(here, *out)["metrics"]
    mask = here / "Annotations" / "480p" / "walk" / "00001.png"
    pixels, palette = np.array(Image.open(mask)), Image.open(mask).getpalette()
    pixels[pixels == 1] = 0                                  # corrected
    image = Image.fromarray(pixels)
    image.putpalette(palette)
    image.save(mask)
    assert run(here, *out)["metrics"]["J mean"] < first["J mean"]
    assert done == ["run", "walk", "walk"]
    assert run(there, *out)["metrics"] == first
    assert done == ["run", "walk", "walk", "run", "walk"]
    assert run(there, *out)["metrics"] == first
    assert len(done) == 5


def test_a_vision_transformer(davis, monkeypatch):
    torch.manual_seed(0)
    vit = VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=2)
    vit.heads, vit.spec = torch.nn.Identity(), build_backbone("squeezenet1_1", image_size=64).spec
    monkeypatch.setattr("checkpoints.frozen.build_backbone", lambda *_: vit.eval())
    record = run(davis, "--weights", "untrained", "-a", "vit_ti_16")
    assert record["map"] == {"stage": "patch tokens", "stride": 16}
    assert 0 < record["metrics"]["J&F mean"] < 100


@pytest.mark.parametrize("flag", ["--workers", "--on-bad-image", "--features"])
def test_flags_that_it_does_not_read_are_none(flag, davis, capsys):
    with pytest.raises(SystemExit):
        run(davis, flag, "skip")
    assert f"unrecognized arguments: {flag} skip" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"null", b'{"files": 3}', b'{"objects": []}', b"[" * 100_000])
def test_kept_scores_that_are_damaged_are_none(content, davis, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    assert _kept(tmp_path / "run.json", open_davis(davis)[0]) is None


def test_masks_do_not_replace_those_of_the_data(davis):
    with pytest.raises(UserError, match=r"--masks .* lies in the Annotations of --data .*, which it would replace"):
        run(davis, "--masks", str(davis / "Annotations" / "480p"))


def test_bad_input(davis, tmp_path):
    with pytest.raises(UserError, match=r"--data .* holds no DAVIS 2017: .*davischallenge.org"):
        open_davis(tmp_path)
    with pytest.raises(UserError, match=r"test.txt was not found"):
        open_davis(davis, "test")
    (davis / "ImageSets" / "2017" / "gone.txt").write_text("run\nfly\n")
    with pytest.raises(UserError, match="of the sequence fly it has 0 frames"):
        open_davis(davis, "gone")
    (davis / "ImageSets" / "2017" / "none.txt").write_text("\n")
    with pytest.raises(UserError, match="lists no sequence"):
        open_davis(davis, "none")
    for name in ("../run", "/etc", ".."):                    # scores and masks would be written there
        (davis / "ImageSets" / "2017" / "odd.txt").write_text(f"run\n{name}\n")
        with pytest.raises(UserError, match=f"names {name}, expected names of folders"):
            open_davis(davis, "odd")
    sequence = open_davis(davis)[0]
    assert sequence.mask(0).max() == 2                       # 255 is no object
    Image.new("RGB", (96, 64)).save(tmp_path / "rgb.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(UserError, match="is not a mask: found RGB"):
        sequence._replace(masks=[tmp_path / "rgb.png"]).mask(0)
    with pytest.raises(UserError, match="cannot be decoded"):
        sequence._replace(frames=[tmp_path / "broken.jpg"]).frame(0)
    with pytest.raises(UserError, match="cannot be decoded"):
        sequence._replace(masks=[tmp_path / "broken.jpg"]).mask(0)
