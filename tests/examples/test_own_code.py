"""The examples of one's own network, loss and data set: a run with all three, and what is done with its student."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import load, metrics
from helpers.scripts import assert_refused, in_this_process, well

import coss
from models.backbones import build_backbone

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The examples, a teacher, and a run of one epoch."""
    folder = tmp_path_factory.mktemp("own")
    for path in EXAMPLES.glob("my_*.py"):
        shutil.copy(path, folder)
    torch.manual_seed(0)
    trunk = build_backbone("resnet_small", image_size=32)
    torch.save({**trunk.spec.record(), "state_dict": {f"backbone.{k}": v for k, v in trunk.state_dict().items()}},
               folder / "teacher.pth")
    well(distil(folder))
    return folder


def distil(folder, *more, output="run"):
    loss = [] if "--loss" in more else ["--loss", folder / "my_loss.py:Huber", "--huber-delta", 0.5]
    return in_this_process(
        "train_distill.py", "--data", folder / "my_data.py:build", "-a", folder / "my_model.py:build", *loss,
        "--distill", folder / "teacher.pth", "--sampler", "random",
        "-b", 32, "--epochs", 1, "--warmup-epochs", 0, "--lr", 0.01, "--image-size", 32, "-j", 0, "-p", 1, "--device",
        "cpu", "--output", folder / output, *more)


def test_the_run_records_its_code(work):
    config, student = json.loads((work / "run" / "config.json").read_text()), load(work / "run" / "student.pth")
    assert config["losses"] == {"Huber": {"huber_delta": 0.5}}
    assert student["arch"] == config["student_arch"] == str(work / "my_model.py:build")
    hashes = [config["code_sha256"], config["data_code_sha256"], config["loss_code_sha256"]["Huber"]]
    assert all(len(x) == 64 for x in hashes) and len(set(hashes)) == 3
    assert {"loss", "largest"} <= set(metrics(work / "run")[0])


def test_its_student_is_evaluated_exported_and_loaded_where_its_code_is_named(work):
    student, arch = work / "run" / "student.pth", work / "my_model.py:build"
    assert_refused(in_this_process("export.py", "--weights", student, "--to", "state_dict", "--output", work / "a.pth"),
                   ["someone's own code", f"give --arch {arch}"])
    with pytest.raises(coss.UserError, match="run only where a command line names it"):
        coss.load(student)
    done = well(in_this_process("compute_knn.py", "eval", "--data", work / "my_data.py:build", "--weights", student,
                                "-a", arch, "--workers", 0, "--device", "cpu"))
    assert "64 training and 64 test images, 4 classes" in done.out
    well(in_this_process("export.py", "--weights", student, "-a", arch, "--to", "state_dict", "--output",
                         work / "b.pth"))
    network = coss.load(student, arch=str(arch), device="cpu")
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    by_hand = coss.load(work / "b.pth", arch=str(arch), device="cpu", image_size=32)(images)  # names alone
    assert torch.equal(network(images), by_hand) and by_hand.shape == (2, 128)
    state = load(work / "b.pth")
    assert "stages.0.0.weight" in state and not any("head" in name for name in state)
    from runtime.own import load_own  # the network as the person has it
    module = load_own(str(arch), "-a").value().eval()
    module.load_state_dict(state)
    with torch.no_grad():
        map_ = module(network.encoder.normalise(images))
    assert torch.equal(map_.mean((2, 3)), by_hand)


@pytest.mark.parametrize("name", ["my_model", "my_loss", "my_data"])
def test_a_run_goes_on_with_the_same_code_alone(work, name):
    path = work / f"{name}.py"
    text = path.read_text()
    assert "resuming from" in well(distil(work)).out
    path.write_text(text + "\n# changed\n")
    try:
        assert_refused(distil(work), ["holds a different run (", "code_sha256", " was '", ", now '"])
    finally:
        path.write_text(text)


def test_changed_code_is_noted_where_the_weights_are_read(work):
    changed = work / "elsewhere" / "my_model.py"
    changed.parent.mkdir()
    changed.write_text((work / "my_model.py").read_text() + "\n# changed\n")
    report = coss.load(work / "run" / "student.pth", arch=f"{changed}:build", device="cpu").report
    assert "has changed since these weights were saved" in str(report)


NETWORK = "from torch import nn\nimport torch\n"


@pytest.mark.parametrize(("flag", "code", "words"), [
    ("-a", "def build():\n    return 3\n", ["returns a int", "return an nn.Module"]),
    ("-a", NETWORK + "def build():\n    return nn.Linear(3, 4)\n", ["fails on images of 32 pixels (RuntimeError"]),
    ("-a", NETWORK + "def build():\n    return nn.Sequential(nn.Flatten(0))\n",
     ["returns torch.float32 [6144] for images [2, 3, 32, 32]"]),
    ("--loss", "def build():\n    return 3\n", ["is not a subclass of losses.base.Loss"]),
    ("--loss", "from losses.base import Loss\nclass build(Loss):\n    def forward(self, *, student, teacher):\n"
               "        return (student - teacher).mean()\n", ["returns a Tensor, expected a dict of scalars"]),
    ("--loss", "from losses.base import Loss\nclass build(Loss):\n    def forward(self, *, student, teacher):\n"
               "        return {'loss': student.sum(1)}\n", ["returns the loss", "(shape [4])"]),
    ("--loss", "from losses.base import Loss\nclass build(Loss):\n    def forward(self, *, student, teacher):\n"
               "        return {'loss': teacher.sum()}\n", ["without gradient"]),
    ("--loss", "from losses.base import Loss, Needs\nclass build(Loss):\n    needs = Needs(head='big')\n",
     ["needs the student's head 'big', which does not exist", "choose from none"]),
    ("--data", "def build(split):\n    return [1, 2]\n", ["cannot open image 0 (int int64 [] is not an image)"]),
    ("--data", "def build(split):\n    return 3\n", ["returns a int with 0 images for 'train'"]),
    ("--data", "def build():\n    return 3\n", ["fails while it creates the data set for 'train' (TypeError"]),
])
def test_what_breaks_the_contract_is_refused(flag, code, words, work, tmp_path):
    (tmp_path / "wrong.py").write_text(code)
    done = distil(work, flag, tmp_path / "wrong.py:build", output="refused")
    assert_refused(done, ["wrong.py:build", *words])
    assert not (work / "refused").exists()


def test_a_setting_that_is_another_flags_is_refused(work, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from typing import Annotated\nfrom losses.base import Loss\nfrom runtime.settings import Setting\n"
        "class Mine(Loss):\n    def __init__(self, lr: Annotated[float, Setting('rate')] = 1.0):\n"
        "        super().__init__()\n"
        "class Twin(Loss):\n    def __init__(self, s_temp: Annotated[float, Setting('other')] = 1.0):\n"
        "        super().__init__()\n")
    for name, words in (("Twin", "declare s_temp apart"), ("Mine", "setting lr of Mine would be a second flag --lr")):
        assert_refused(distil(work, "--loss", tmp_path / f"mine.py:{name}", output="refused"), [words])


def test_a_data_set_crosses_into_a_worker_that_is_not_forked(work):
    import pickle

    from data.datasets import open_source

    source = open_source(str(work / "my_data.py:build")).take(np.array([5, 3]))
    again = pickle.loads(pickle.dumps(source))
    assert list(again.names) == ["tile 0,5", "tile 0,3"] == list(source.names)
    assert np.array_equal(np.asarray(again.open(1)), np.asarray(source.open(1)))
    assert again.identity() == source.identity() != source.take(np.array([1])).identity()
