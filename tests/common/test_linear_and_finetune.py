"""evaluate.py linear and finetune on a tiny tree: results left, resume, the frozen network, bad input."""

import json
import shutil

import pytest
import torch
from helpers.scripts import in_this_process, script, well
from torch import nn
from torchvision import datasets
from torchvision import transforms as T

from models.backbones import build_backbone
from models.teachers import FrozenEncoder
from runtime.run import Run

ARCH = "shufflenet_small"


def flags(tree, weights, output, *more):
    return ["--data", tree, "--weights", weights, "--output", output, "--device", "cpu", "--workers", 0, "-p", 1,
            "--lr", 0.5, *more]


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def linear(tree, weights, tmp_path_factory):
    """Two epochs of the protocol on 40 images."""
    output = tmp_path_factory.mktemp("linear")
    done = well(in_this_process("evaluate.py", "linear", *flags(tree, weights, output, "--epochs", 2, "-b", 16)))
    return output, done


def run_folder(output, command="linear"):
    folder, = output.glob(f"{command}-*")
    return folder


def test_what_linear_leaves(linear, weights):
    output, done = linear
    record, = results(output)
    assert record["command"] == "linear"
    assert (record["arch"], record["stem"], record["image_size"]) == (ARCH, "cifar", 32)
    assert record["sources"]["train"]["images"] == 40
    assert record["metrics"]["last"]["epoch"] == 2
    assert record["metrics"]["best"]["top1"] >= record["metrics"]["last"]["top1"]
    assert record["settings"]["epochs"] == 2
    assert (output / "linear.md").read_text().count("\n") == 4
    assert "best" in done.out
    head = torch.load(run_folder(output) / "last.pth", weights_only=True)["state_dict"]
    assert head["weight"].shape == (4, 1024)


def test_the_rate_falls_at_60_and_80_percent(linear):
    lines = [json.loads(line) for line in (run_folder(linear[0]) / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if line["group"] == "train"]
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05])  # of two epochs the first of both milestones is the second


def test_the_test_score_is_the_saved_heads(linear, tree, weights):
    """Oracle: torchvision's network on torchvision's transform, and the head that was saved."""
    record, = results(linear[0])
    backbone = build_backbone(ARCH, "cifar", 32).eval()
    backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in torch.load(
        weights, weights_only=True)["state_dict"].items()})
    transform = T.Compose([T.Resize(37), T.CenterCrop(32), T.ToTensor(),
                           T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    images = datasets.ImageFolder(str(tree / "val"), transform)
    x, y = map(torch.stack, zip(*[(image, torch.tensor(label)) for image, label in images], strict=True))
    state = torch.load(run_folder(linear[0]) / "last.pth", weights_only=True)["state_dict"]
    with torch.no_grad():
        logits = backbone(x) @ state["weight"].T + state["bias"]
    assert record["metrics"]["last"]["top1"] == pytest.approx(100 * (logits.argmax(1) == y).double().mean().item())


def test_an_interrupted_linear_goes_on_to_the_same_head(linear, tree, weights, tmp_path, monkeypatch):
    save = Run.save

    def stop_after_the_first(self, epoch, *rest):
        save(self, epoch, *rest)
        raise KeyboardInterrupt

    def line(data):
        return ["linear", *flags(data, weights, tmp_path, "--epochs", 2, "-b", 16)]

    monkeypatch.setattr(Run, "save", stop_after_the_first)
    assert in_this_process("evaluate.py", *line(tree)).rc == 130
    monkeypatch.undo()
    copied = shutil.copytree(tree, tmp_path / "copy", copy_function=shutil.copyfile)  # the same files, changed just now
    assert "resuming" in well(in_this_process("evaluate.py", *line(copied))).out
    one, two = (torch.load(run_folder(output) / "last.pth", weights_only=True)["state_dict"]
                for output in (linear[0], tmp_path))
    assert torch.equal(one["weight"], two["weight"])
    assert results(tmp_path)[-1]["metrics"] == results(linear[0])[-1]["metrics"]


def test_a_network_that_moves_is_found_out(tree, weights, tmp_path, monkeypatch):
    """A batch norm in training mode moves its statistics, without any gradient."""
    monkeypatch.setattr(FrozenEncoder, "train", lambda self, mode=True: nn.Module.train(self, True))
    done = in_this_process("evaluate.py", "linear", *flags(tree, weights, tmp_path, "--epochs", 1, "-b", 16))
    assert done.rc == 2
    assert "the frozen network changed while the classifier was trained" in done.err
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_cached_is_one_json_object_and_finds_its_features_again(solver, tree, weights, tmp_path):
    line = ["linear", *flags(tree, weights, tmp_path, "--cached", "--solver", solver, "--epochs", 2, "--iterations", 9,
                            "--json")]
    first, second = (json.loads(well(in_this_process("evaluate.py", *line)).out) for _ in range(2))
    assert first["metrics"] == second["metrics"]
    assert len(list((tmp_path / "features").glob("*.npy"))) == 2
    assert [record["metrics"] for record in results(tmp_path)] == [first["metrics"]] * 2
    assert {"top1", "top5", "wd", "validation_top1"} <= first["metrics"].keys()


def test_finetune_on_a_share_and_on_a_list(tree, weights, tmp_path):
    line = ["finetune", *flags(tree, weights, tmp_path, "--head-lr", 1, "--epochs", 2)]
    record = json.loads(well(in_this_process("evaluate.py", *line, "--labels", 0.3, "--json")).out)
    assert record["sources"]["train"]["images"] == 12
    folder = run_folder(tmp_path, "finetune")
    rates = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [x["lr"] for x in rates if x["group"] == "train"] == pytest.approx([0.5, 0.1])  # a fifth at 60 %
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert [group["lr"] for group in state["updater"]["optimizer"]["param_groups"]] == pytest.approx([0.1, 0.2])
    before = torch.load(weights, weights_only=True)["state_dict"]
    after = torch.load(folder / "last.pth", weights_only=True)["state_dict"]
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert {"backbone.conv1.0.weight", "backbone.conv1.1.weight", "backbone.conv1.1.running_mean"} <= moved
    knn = ["eval", "--data", tree, "--weights", folder / "last.pth", "--k", 3, "--device", "cpu", "--workers", 0]
    well(in_this_process("compute_knn.py", *knn))  # is a checkpoint like any other

    names = tmp_path / "1percent.txt"
    names.write_text("train03.jpg\n")
    done = in_this_process("evaluate.py", *line, "--labels", names)
    assert (done.rc, "4 images of" in done.err) == (2, True)
    names.write_text("\n".join(f"{name}/train0{i}.jpg" for name in ("across", "down", "fall", "rise") for i in (1, 2)))
    record = json.loads(well(in_this_process("evaluate.py", *line, "--labels", names, "--json")).out)
    assert record["sources"]["train"]["images"] == 8


@pytest.mark.parametrize(("command", "changed", "words"), [
    ("linear", ["--data", "nowhere"], "--data nowhere was not found"),
    ("linear", ["--weights", "none.pth"], "--weights none.pth"),
    ("linear", ["--output", __file__], "is not a folder; choose another folder"),
    ("linear", ["-b", 41], "--batch-size 41 is more than the 40 images"),
    ("linear", ["--cached", "--solver", "sgd", "--subset", 0.5], "--validation 0.1 holds out none of the 20 training"),
    ("linear", ["--cache", "host", "--image-cache", 1], "--image-cache 1 has no effect with --cache host"),
    ("finetune", ["--labels", "0.001"], "--labels 0.001 leaves no image a class"),
    ("finetune", ["--labels", "none.txt"], "--labels none.txt could not be read"),
])
def test_bad_input_is_one_sentence(command, changed, words, tree, weights, tmp_path):
    line = flags(tree, weights, tmp_path, "--epochs", 1, *(["--labels", 0.5] if command == "finetune" else []))
    done = in_this_process("evaluate.py", command, *line, *changed)
    error, = (line for line in done.err.splitlines() if "has no effect: it is used" not in line)  # --lr, with --cached
    assert done.rc == 2
    assert error.startswith("error: ")
    assert words in error
    assert not (tmp_path / "features").exists()  # nothing was computed before


def test_two_processes_train_what_one_does(linear, tree, weights, tmp_path):
    well(script("evaluate.py", "linear", *flags(tree, weights, tmp_path, "--epochs", 2, "-b", 16), processes=2))
    one, two = (torch.load(run_folder(output) / "last.pth", weights_only=True)["state_dict"]
                for output in (linear[0], tmp_path))
    torch.testing.assert_close(one["weight"], two["weight"], rtol=1e-3, atol=1e-4)
    assert results(tmp_path)[0]["processes"] == 2
