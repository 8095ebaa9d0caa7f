"""evaluate.py transfer and robustness as they are run, on rendered images."""

import json
import shutil

import numpy as np
import pytest
import torch
import torchvision
from helpers.images import render
from helpers.scripts import in_this_process, script, well

from data.datasets import open_source
from data.packing import pack
from data.packing_part import Recipe
from evals.results import RESULTS, read_results
from evals.robustness import ALEXNET

COMMON = ["--image-size", 32, "--workers", 0, "--device", "cpu"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """stripes/: train, val and test of two classes; called like ImageNet's, images from elsewhere."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3), ("test", 4)):
        for kind, name in enumerate(("n01", "n02")):
            for i in range(count):
                render(root / "stripes" / part / name / f"{i}.jpg", kind, rng)
    for number in range(2):
        shutil.copytree(root / "stripes" / "val" / f"n0{number + 1}",
                        root / "v2" / "imagenetv2-top-images-format-val" / str(number))
    shutil.copytree(root / "stripes" / "val" / "n02", root / "r" / "n02")
    for corruption in list(ALEXNET)[:2]:
        for severity in range(1, 6):
            shutil.copytree(root / "stripes" / "test", root / "c" / corruption / str(severity))
    torch.manual_seed(0)
    torch.save(torchvision.models.get_model("squeezenet_small").state_dict(), root / "net.pth")
    return root


@pytest.fixture(scope="module")
def net(root):
    return ["--weights", root / "net.pth", *COMMON]


@pytest.fixture(scope="module")
def transferred(root, net):
    flags = ["--datasets", "stripes", "--root", root, "--few-shot", "--ways", 2, "--shots", 1, 5, "--queries", 3,
             "--episodes", 20, "--few-shot-heads", "centroid", "logistic", *net, "--output", root / "out"]
    return flags, well(in_this_process("evaluate.py", "transfer", *flags))


def test_transfer_leaves_a_record_and_a_table(transferred, root):
    _, done = transferred
    record, = read_results(root / "out" / RESULTS)
    found = record["metrics"]["datasets"]["stripes"]
    assert record["command"] == "transfer"
    assert record["metrics"]["mean"] == found["score"]
    assert [each["images"] for each in record["sources"].values()] == [16, 6, 8]
    assert [(each["head"], each["shots"], each["episodes"]) for each in found["few_shot"]] == [
        (head, shots, 20) for head in ("centroid", "logistic") for shots in (1, 5)]
    assert "stripes: 2 classes; 16 train, 6 validation, 8 test images" in done.out
    assert "2-way 5-shot logistic" in done.out
    assert (root / "out" / "transfer.md").read_text().startswith("| data | metric | score")


def test_transfer_against_scikit_learn_on_the_kept_features(transferred, root):
    from sklearn.linear_model import LogisticRegression

    found = read_results(root / "out" / RESULTS)[0]["metrics"]["datasets"]["stripes"]
    features = {len(rows): rows for rows in map(np.load, (root / "out" / "features").glob("*.npy"))}
    fit, labels = np.concatenate([features[16], features[6]]), np.repeat([0, 1, 0, 1], [8, 8, 3, 3])
    model = LogisticRegression(C=1 / found["l2"], max_iter=1000).fit(fit, labels)
    assert found["score"] == pytest.approx(100 * model.score(features[8], np.repeat([0, 1], 4)), abs=12.6)


def test_transfer_again_goes_on_from_what_is_there(transferred, root, monkeypatch):
    flags, _ = transferred

    def fail(*_, **__):
        raise AssertionError("fitted again")

    kept, = (root / "out" / "transfer").iterdir()
    result = json.loads(kept.read_text())
    monkeypatch.setattr("common.evaluate_transfer.transfer", fail)
    done = well(in_this_process("evaluate.py", "transfer", *flags, "--json"))
    assert json.loads(done.out)["metrics"]["datasets"]["stripes"]["path"] == result["path"]


@pytest.mark.parametrize("command", ["transfer", "linear"])
def test_a_pack_that_was_made_anew_in_its_place_is_another(command, root, net, tmp_path):
    """The second evaluation says what one says that finds nothing kept."""
    more = ["--epochs", 1, "--lr", 0.5] if command == "linear" else ["--iterations", 5]

    def evaluated(output):
        well(in_this_process("evaluate.py", command, "--data", tmp_path / "packs", *net, *more, "--output", output))
        kept = {file.name: np.load(file).tolist() for file in (output / "features").glob("*.npy")}
        return kept, read_results(output / RESULTS)[-1]["metrics"]

    for split, part in (("train", "train"), ("test", "val")):
        pack(open_source(str(root / "stripes"), split), tmp_path / "packs" / f"{part}.pack", Recipe(), 0)
    before, _ = evaluated(tmp_path / "out")
    for split, part in (("train", "train"), ("test", "val")):
        (tmp_path / "packs" / f"{part}.pack").unlink()
        pack(open_source(str(root / "stripes"), split), tmp_path / "packs" / f"{part}.pack", Recipe("raw", 8), 0)
    (after, metrics), (fresh, expected) = evaluated(tmp_path / "out"), evaluated(tmp_path / "fresh")
    assert after == before | fresh
    assert len(after) == len(before) + len(fresh)
    assert metrics == expected
    if command == "linear":
        assert len(list((tmp_path / "out").glob("linear-*/checkpoint.pth"))) == 2


def test_two_processes_give_what_one_does(transferred, root):
    flags, _ = transferred
    done = well(script("evaluate.py", "transfer", *flags, "--output", root / "two", "--json", processes=2))
    one = read_results(root / "out" / RESULTS)[0]["metrics"]
    two = json.loads(done.out.strip().splitlines()[-1])["metrics"]
    assert two["datasets"]["stripes"]["few_shot"] == one["datasets"]["stripes"]["few_shot"]
    assert two["mean"] == pytest.approx(one["mean"], abs=12.6)  # one of eight images: batches differ, so do last digits


def test_episodes_that_cannot_be_drawn_are_refused_before_any_work(root, net, tmp_path):
    done = in_this_process("evaluate.py", "transfer", "--data", root / "stripes", "--few-shot", *net, "--output",
                           tmp_path / "out")
    assert (done.rc, done.out) == (2, "")
    assert "stripes, few-shot: 5 classes an episode need 35 images each, and 0 classes have so many" in done.err


@pytest.mark.parametrize(("flags", "says"), [
    ([], "--data ROOT or --datasets NAME"),
    (["--data", "x", "--datasets", "pets"], "--data ROOT or --datasets NAME"),
    (["--data", "x", "--download"], "--root and --download belong to --datasets"),
    (["--datasets", "pets", "--skip-linear"], "--skip-linear leaves nothing"),
    (["--datasets", "pets", "pets"], "names a set twice"),
    (["--datasets", "pets", "--root", "nowhere"], "--datasets pets was not found"),
])
def test_bad_input_is_one_sentence(flags, says, net, tmp_path):
    done = in_this_process("evaluate.py", "transfer", *flags, *net, "--output", tmp_path / "out")
    assert (done.rc, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("error: ")
    assert says in done.err
    assert not list(tmp_path.iterdir())


def test_robustness(root, net):
    flags = ["--train", root / "stripes", "--ood", f"v2={root}/v2", f"r={root}/r", f"c={root}/c", "--epochs", 5,
             "--rates", 0.1, "--decays", 0, *net, "--output", root / "robust", "--json"]
    record = json.loads(well(in_this_process("evaluate.py", "robustness", *flags)).out)
    sets = record["metrics"]["sets"]
    assert list(sets)[:3] == ["test", "v2/top-images", "r"]
    assert len(sets) == 3 + 10
    # v2 is a copy of what --train is tested on; its folders are numbers
    assert {k: sets["v2/top-images"][k] for k in ("top1", "ece", "nll")} == {
        k: pytest.approx(sets["test"][k]) for k in ("top1", "ece", "nll")}
    assert (sets["r"]["classes"], sets["r"]["top1"], sets["r"]["nll"]) == (1, 100, pytest.approx(0))
    corruptions = record["metrics"]["corruptions"]["c"]
    noise = corruptions["errors"]["gaussian_noise"]
    assert corruptions["ce"]["gaussian_noise"] == pytest.approx(
        100 * sum(noise.values()) / 5 / ALEXNET["gaussian_noise"])
    assert corruptions["mce"] is None
    table = (root / "robust" / "robustness.md").read_text()
    assert "| c (2 of 15 corruptions) | 80 |" in table


def test_robustness_bad_input(root, net, tmp_path):
    for value, says in ((f"r={root}/gone", "--ood r="), ("r", "is not NAME=DIR"), (f"r={root}/c/fog", "--ood r="),
                        (f"test={root}/r", "--ood test=DIR has the name of the test images")):
        done = in_this_process("evaluate.py", "robustness", "--train", root / "stripes", "--ood", value, *net,
                               "--output", tmp_path / "out")
        assert (done.rc, done.err.count("\n")) == (2, 1)
        assert says in done.err
        assert not (tmp_path / "out").exists()
