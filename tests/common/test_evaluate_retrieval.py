"""evaluate.py retrieval on a tiny revisited Oxford and on labelled folders."""

import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import evaluate
from checkpoints.frozen import load_frozen
from evals.retrieval import revisited
from evals.sets.landmarks import open_landmarks
from models.backbones import build_backbone
from runtime.device import Process
from runtime.errors import UserError

ALONE = Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A network, a landmark benchmark, and labelled folders of images that have a colour each class."""
    root = tmp_path_factory.mktemp("retrieval")
    generator = np.random.default_rng(0)

    def save(path, width=48, colour=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (36, width, 3)) // (1 if colour is None else 4)
        if colour is not None:
            pixels[..., colour] += 190
        Image.fromarray(pixels.astype(np.uint8)).save(path)

    torch.manual_seed(0)
    backbone = build_backbone("squeezenet_small", image_size=32)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in backbone.state_dict().items()},
                **backbone.spec.record()}, root / "net.pth")
    database, queries = [f"d{i}" for i in range(6)], ["q0", "q1"]
    for i, name in enumerate([*database, *queries]):
        save(root / "roxford5k" / "jpg" / f"{name}.jpg", 40 + 4 * i)
    truth = [{"bbx": [3.0, 2, 39, 35], "easy": [1, 4], "hard": [0], "junk": [2]},
             {"bbx": [0.0, 0, 40, 36], "easy": [], "hard": [5], "junk": [3]}]
    (root / "roxford5k" / "gnd_roxford5k.pkl").write_bytes(
        pickle.dumps({"imlist": database, "qimlist": queries, "gnd": truth}))
    for number in range(3):
        for i in range(4):
            save(root / "val" / f"colour{number}" / f"{i}.png", colour=number)
            save(root / "pair" / ("query" if i < 2 else "database") / f"colour{number}" / f"{i}.png", colour=number)
    save(root / "pair" / "query" / "new" / "0.png")
    return root


def retrieval(root, *more):
    args = evaluate.parse_args(["retrieval", "--weights", str(root / "net.pth"), "--output", str(root / "out"),
                                "--device", "cpu", "--workers", "0", *map(str, more)])
    return evaluate.COMMANDS["retrieval"].run(args, ALONE)


def test_revisited_with_several_scales(root, capsys):
    record = retrieval(root, "--root", root, "--datasets", "roxford5k", "--scales", 1, 0.75, "--long-side", 50)
    encoder, _ = load_frozen(root / "net.pth")
    landmarks = open_landmarks(root, "roxford5k", 50)

    def described(source):
        rows = []
        for i in range(len(source)):
            x = encoder.normalise(pil_to_tensor(source.open(i))[None])
            rows.append(sum(F.normalize(encoder.backbone(y), dim=1) for y in (
                x, F.interpolate(x, scale_factor=0.75, mode="bilinear", align_corners=False)))[0])
        return F.normalize(torch.stack(rows), dim=1)

    with torch.inference_mode():
        expected = revisited(described(landmarks.queries) @ described(landmarks.database).T, landmarks.truth)
    for protocol in ("easy", "medium", "hard"):
        assert record["metrics"]["roxford5k"][protocol] == pytest.approx(expected[protocol])
    assert [record["metrics"]["roxford5k"][x]["queries"] for x in ("easy", "medium", "hard")] == [1, 2, 2]
    assert record["sources"]["roxford5k database"]["images"] == 6
    assert "medium" in capsys.readouterr().out
    kept = {path: path.stat().st_mtime_ns for path in (root / "out" / "features").glob("*.npy")}
    once = retrieval(root, "--root", root, "--datasets", "roxford5k", "--long-side", 50)
    assert once["metrics"] != record["metrics"]                    # one scale is not read from two scales' cache
    again = retrieval(root, "--root", root, "--datasets", "roxford5k", "--scales", 1, 0.75, "--long-side", 50)
    assert again["metrics"] == record["metrics"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_classes_among_themselves_and_in_a_database(root):
    found = retrieval(root, "--data", root / "val", "--recall-at", 1, 3)
    assert found["metrics"]["queries"] == 12
    assert set(found["metrics"]) == {"mAP", "recall@1", "recall@3", "queries", "without_answer"}
    assert found["metrics"]["recall@1"] > 50                       # colours are told apart by any network
    pair = retrieval(root, "--data", root / "pair")
    assert {role: x["images"] for role, x in pair["sources"].items()} == {"queries": 7, "database": 6}
    assert (pair["metrics"]["queries"], pair["metrics"]["without_answer"]) == (6, 1)
    lines = [json.loads(line) for line in (root / "out" / "results.jsonl").read_text().splitlines()]
    assert lines[-1]["metrics"] == pair["metrics"]


def test_bad_input(root, tmp_path):
    for wrong in ([], ["--data", "x", "--datasets", "roxford5k", "--root", "y"], ["--datasets", "roxford5k"]):
        with pytest.raises(UserError, match="give one of the two"):
            retrieval(root, *wrong)
    with pytest.raises(UserError, match="holds no rparis6k"):
        retrieval(root, "--root", root, "--datasets", "rparis6k")
    with pytest.raises(UserError, match="labels"):
        retrieval(root, "--data", root / "val" / "colour0")
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / "0.png")
    with pytest.raises(UserError, match="no query's class"):
        retrieval(root, "--data", tmp_path)
