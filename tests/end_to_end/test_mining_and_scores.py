"""compute_knn.py mine and eval against torchvision and votes written here."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers.experiment import STUDENT, TEACHER
from helpers.images import render
from helpers.runs import load
from helpers.scripts import in_this_process, script, well
from torch import nn

from common import networks
from data.datasets import open_source
from runtime.device import Process
from runtime.errors import UserError
from search.mining import union_of_ranges
from search.rowfile import RowFile

ALONE = Process(0, 1, torch.device("cpu"))


def features_by_torchvision(teacher, tree):
    """Features of the training images in ImageFolder's order, with neither our loader nor our trunk."""
    model = torchvision.models.get_model(TEACHER)
    model.conv1[0] = nn.Conv2d(3, 24, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    model.fc = nn.Identity()
    prefix = "module.encoder_q."
    model.load_state_dict({k[len(prefix):]: v for k, v in load(teacher)["state_dict"].items() if ".fc." not in k})
    return features_of_torchvision(model, tree)


def features_of_torchvision(model, tree):
    """Unit features [n, d] in float64 of tree/train by a torchvision network without its head."""
    from torchvision import transforms as T

    transform = T.Compose([T.Resize(33, interpolation=T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToTensor(),
                           T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    folder = torchvision.datasets.ImageFolder(tree / "train", transform)
    with torch.no_grad():
        features = model.eval()(torch.stack([image for image, _ in folder])).double()
    return torch.nn.functional.normalize(features, dim=1)


def test_mined_neighbours_are_the_nearest(teacher, neighbours, tree):
    features = features_by_torchvision(teacher, tree)
    similarity = features @ features.T
    for name, sign in (("closek_info", 1), ("fark_info", -1)):
        ids = np.load(neighbours.with_name(f"{name}.npy"), allow_pickle=False)
        assert ids.dtype == np.int64
        assert ids.shape == (40, 12)
        ranked = (sign * similarity).masked_fill(torch.eye(40, dtype=torch.bool), -torch.inf)
        best = ranked.sort(dim=1, descending=True).values[:, :12]
        found = ranked.gather(1, torch.from_numpy(ids))
        torch.testing.assert_close(found, best, rtol=0, atol=2e-6)  # equal up to rounding of near ties
        assert all(len(set(row)) == 12 and i not in row for i, row in enumerate(ids.tolist()))
    twin = json.loads(neighbours.with_suffix(".json").read_text())
    assert twin["teacher_sha256"] == hashlib.sha256(teacher.read_bytes()).hexdigest()
    names = [str(Path(path).relative_to(tree / "train")) for path, _ in
             torchvision.datasets.ImageFolder(tree / "train").samples]
    assert twin["fingerprint"] == hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()
    assert (twin["teacher_arch"], twin["images"], twin["k"], twin["image_size"]) == (TEACHER, 40, 12, 32)


def test_mining_goes_on_after_a_kill(tree, teacher, tmp_path, monkeypatch):
    """With room for one row at a time each row is a block; the second run makes those that the first did not."""
    flags = ["mine", "--data", tree / "train", "--weights", teacher, "--k", 12, "--far", "--workers", 0, "--device",
             "cpu", "--memory", "1e-9", "--output"]
    well(in_this_process("compute_knn.py", *flags, tmp_path / "whole"))
    write, written = RowFile.write, []

    def counted(self, first, rows):
        if len(written) == 25:
            raise KeyboardInterrupt
        write(self, first, rows)
        written.append((self.path.stem, first))

    monkeypatch.setattr(RowFile, "write", counted)
    assert in_this_process("compute_knn.py", *flags, tmp_path / "nn").rc == 130
    assert not list((tmp_path / "nn").glob("*.npy"))
    written.append(None)
    well(in_this_process("compute_knn.py", *flags, tmp_path / "nn"))
    assert len(written) == 1 + 80 + 1, "only the row whose far half was missing is made twice"
    for name in ("closek_info", "fark_info"):
        assert np.array_equal(*(np.load(tmp_path / folder / f"{name}.npy") for folder in ("nn", "whole")))


@pytest.mark.parametrize("metric", ["inner", "l2"])
def test_mining_by_another_metric_in_half_precision(metric, tree, teacher, tmp_path):
    well(in_this_process("compute_knn.py", "mine", "--data", tree / "train", "--weights", teacher, "--output", tmp_path,
                         "--k", 3, "--workers", 0, "--device", "cpu", "--metric", metric, "--dtype", "float16",
                         "--features", tmp_path / "features", "--products", "bf16"))
    path, = (tmp_path / "features").glob("*.npy")
    features = np.load(path)
    assert features.dtype == np.float16
    features = features.astype(np.float64)
    scores = features @ features.T if metric == "inner" else -((features[:, None] - features[None]) ** 2).sum(2)
    np.fill_diagonal(scores, -np.inf)
    found = np.take_along_axis(scores, np.load(tmp_path / "closek_info.npy"), 1)
    rounding = 1e-6 * (features**2).sum(1).max()  # of float32; the features of this teacher lie close together
    np.testing.assert_allclose(found, -np.sort(-scores, 1)[:, :3], rtol=0, atol=rounding)
    assert rounding < np.ptp(scores[np.isfinite(scores)]) / 10
    assert json.loads((tmp_path / "closek_info.json").read_text())["metric"] == metric


def test_an_image_without_features_is_named(tree):
    source = open_source(str(tree / "train"))
    features = torch.ones(6, 3)
    features[4] = 0
    with pytest.raises(UserError) as caught:
        networks.refuse_zero_rows(features, range(2, 6), source, ALONE)
    assert source.location(4) in str(caught.value)
    networks.refuse_zero_rows(features, range(4), source, ALONE)


@pytest.mark.parametrize(("lists", "wanted"), [
    ([[range(3)], [range(3)]], [range(3)]), ([[range(3)], []], [range(3)]), ([[], []], []),
    ([[range(5, 7)], [range(2), range(6, 9)]], [range(2), range(5, 9)])])
def test_rows_that_either_file_lacks(lists, wanted):
    assert union_of_ranges(lists) == wanted


def test_eval_prints_one_json_object(run, tree, work):
    done = well(script("compute_knn.py", "eval", "--data", tree, "--weights", run / "student.pth", "--k", 3, 10,
                       "--json", "--features", work / "features", "--workers", 0, "--device", "cpu"))
    assert done.out.count("\n") == 1
    found = json.loads(done.out)
    assert (found["arch"], found["train_images"], found["test_images"], found["classes"]) == (STUDENT, 40, 12, 4)
    assert [(row["k"], row["T"]) for row in found["knn"]] == [(3, 0.07), (10, 0.07)]
    assert all(row["top5"] == 100 for row in found["knn"])
    again = in_this_process("compute_knn.py", "eval", "--data", tree, "--weights", run / "student.pth", "--k", 3, 10,
                            "--json", "--features", work / "features", "--workers", 0, "--device", "cpu")
    assert json.loads(again.out) == found
    fresh = in_this_process("compute_knn.py", "eval", "--data", tree, "--weights", run / "student.pth", "--k", 3, 10,
                            "--json", "--features", "none", "--workers", 0, "--device", "cpu")
    assert json.loads(fresh.out) == found
    assert len(list((work / "features").glob("*.npy"))) == 2


def test_eval_against_torchvision(tree, work):
    """A network with well spread features, so that no vote hangs on the last bit; the vote is written here."""
    torch.manual_seed(3)
    model = torchvision.models.resnet18()
    torch.save({"arch": "resnet18", "state_dict": model.state_dict()}, work / "spread.pth")
    done = well(in_this_process("compute_knn.py", "eval", "--data", tree, "--weights", work / "spread.pth", "--k", 10,
                                "--json", "--features", "none", "--image-size", 32, "--workers", 0, "--device", "cpu"))
    model.fc = nn.Identity()
    (work / "swapped").mkdir()
    (work / "swapped" / "train").symlink_to(tree / "val")
    train, test = (features_of_torchvision(model, root) for root in (tree, work / "swapped"))
    labels = torch.arange(4).repeat_interleave(10)
    right = 0
    for row, truth in zip(test @ train.T, torch.arange(4).repeat_interleave(3), strict=True):
        best = row.topk(11)
        votes = torch.zeros(4, dtype=torch.float64)
        for value, i in zip(best.values[:10], best.indices[:10], strict=True):
            votes[labels[i]] += torch.exp(value / 0.07)
        assert best.values[9] - best.values[10] > 1e-6, "the oracle's own vote is open"
        right += int(votes.argmax() == truth)
    assert json.loads(done.out)["knn"][0]["top1"] == pytest.approx(100 * right / 12)


def test_eval_does_not_take_one_folders_features_for_anothers(teacher, tmp_path):
    """train/ and val/ may well hold files of the same names."""
    rng = np.random.default_rng(5)
    for split in ("train", "val"):
        for kind, name in enumerate(("across", "down")):
            for i in range(6):
                render(tmp_path / split / name / f"{i}.jpg", kind, rng)
    flags = ["eval", "--data", tmp_path, "--weights", teacher, "--k", 1, "--json", "--workers", 0, "--device", "cpu"]
    plain = well(in_this_process("compute_knn.py", *flags, "--features", "none"))
    well(in_this_process("compute_knn.py", *flags, "--features", tmp_path / "features"))
    arrays = [np.load(path) for path in (tmp_path / "features").glob("*.npy")]
    assert len(arrays) == 2, "the validation images got the features of the training images"
    assert not np.array_equal(*arrays)
    kept = well(in_this_process("compute_knn.py", *flags, "--features", tmp_path / "features"))
    assert json.loads(kept.out)["knn"] == json.loads(plain.out)["knn"]
