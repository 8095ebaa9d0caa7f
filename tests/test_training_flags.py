"""The optimizer's and the card's flags, and a step that is cut into parts, averaged, clipped: the real script."""

import json

import pytest
import torch
from helpers.images import render_classes
from helpers.runs import metrics
from helpers.scripts import in_this_process, well
from torch import nn

from models.backbones import build_backbone
from runtime.device import Process
from runtime.errors import UserError
from runtime.hardware import Hardware

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _settings():
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    products = torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before
    torch.set_float32_matmul_precision(products)


@pytest.mark.parametrize(("tf32", "conv", "matmul"), [("conv", True, False), ("all", True, True),
                                                      ("off", False, False)])
def test_tf32(tf32, conv, matmul):
    Hardware(tf32=tf32).prepare(Process(0, 1, CPU))
    assert torch.backends.cudnn.benchmark
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (conv, matmul)
    torch.set_float32_matmul_precision("high")  # as a search does
    Hardware(tf32=tf32).prepare(Process(0, 1, CPU))
    assert torch.get_float32_matmul_precision() == ("high" if matmul else "highest")


def test_synchronised_batch_norm_is_for_several_cards():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    weight = network[1].weight
    hardware = Hardware(sync_bn=True)
    with pytest.raises(UserError, match="^--sync-bn needs GPUs"):
        hardware.prepare(Process(0, 2, CPU))
    hardware.prepare(Process(0, 1, CPU))  # one process has the whole batch
    assert type(hardware.synchronised(network, Process(0, 1, CPU))[1]) is nn.BatchNorm2d
    assert type(Hardware().synchronised(network, Process(0, 2, CPU))[1]) is nn.BatchNorm2d
    found = hardware.synchronised(network, Process(0, 2, torch.device("cuda", 0)))
    assert found is network
    assert type(found[1]) is nn.SyncBatchNorm
    assert found[1].weight is weight
    assert list(found.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var",
                                        "1.num_batches_tracked"]


def test_no_compiler_is_one_sentence(monkeypatch):
    def fails(function):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand a page more")

    monkeypatch.setattr(torch, "compile", fails)
    said = r"^--compile does not work here \(.*No working C\+\+ compiler found\)"
    with pytest.raises(UserError, match=said) as caught:
        Hardware(compile=True).prepare(Process(0, 1, CPU))
    assert "\n" not in str(caught.value)


def test_a_compiled_network_keeps_its_names():
    network = nn.Sequential(nn.Linear(3, 2))
    names, x = list(network.state_dict()), torch.randn(4, 3)
    expected = network(x)
    network.compile(backend="eager")  # no compiler needed
    torch.testing.assert_close(network(x), expected)
    assert list(network.state_dict()) == names


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images of four kinds, and a teacher that has learnt nothing: here it is about the arithmetic."""
    root = tmp_path_factory.mktemp("step")
    render_classes(root / "images", 8)
    torch.manual_seed(0)
    teacher = build_backbone("shufflenet_small", "cifar", 32)
    torch.save({**teacher.spec.record(), "state_dict": teacher.state_dict()}, root / "teacher.pth")
    return root


def distil(work, output, *more, student="squeezenet_small"):
    return in_this_process("train_distill.py", "--data", work / "images", "-a", student, "--distill",
                           work / "teacher.pth", "--sampler", "random", "-b", 16, "--epochs", 2, "-p", 1, "--lr", 1e-5,
                           "--image-size", 32, "--device", "cpu", "--workers", 0, "--output", work / output, *more)


def losses_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["group"] == "train"]


def test_a_step_in_parts_is_the_same_step(work):
    """The student has no batch norm, so its training with 5 images at once is that with all 16."""
    well(distil(work, "whole", "--amp", "off"))
    done = well(distil(work, "parts", "--amp", "off", "--micro-batch", 5, "--space-batch", "global"))
    assert "17 of the teacher's batch norms were folded" in done.out
    expected = losses_of(work / "whole")
    assert len(expected) == 4
    assert losses_of(work / "parts") == pytest.approx(expected, abs=0.01)  # float32, and a scale of 143
    assert max(expected) - min(expected) > 10  # it does move


def test_the_first_step_is_shown_alone_and_no_part_of_the_next_line(work):
    """Norm and cosine are those of the step that is logged, however few lines there are."""
    well(distil(work, "often", "--amp", "off"))
    done = well(distil(work, "seldom", "--amp", "off", "-p", 2))
    often, seldom = metrics(work / "often"), metrics(work / "seldom")
    assert [line["step"] for line in seldom] == [2, 4]
    for line, same in zip(seldom, often[1::2], strict=True):
        assert line["student_norm"] == same["student_norm"] and line["row_cosine"] == same["row_cosine"]
    assert f"cosine {often[0]['row_cosine']:.3f} norm {often[0]['student_norm']:.3g}" in done.out
    assert often[0]["student_norm"] != often[1]["student_norm"]


def test_another_optimizer_clipped_and_averaged(work):
    flags = ["--optimizer", "lars", "--clip-grad", 1, "--ema", 0.9]
    well(distil(work, "lars", *flags))
    files = {name: torch.load(work / "lars" / name, weights_only=True) for name in
             ("student.pth", "student_ema.pth", "checkpoint.pth")}
    student, average = files["student.pth"]["state_dict"], files["student_ema.pth"]["state_dict"]
    assert list(student) == list(average)
    assert any(not torch.equal(student[name], average[name]) for name in student)
    assert all(tensor.is_contiguous() for tensor in [*student.values(), *average.values()])
    assert files["checkpoint.pth"]["updater"]["kind"] == "LARS"
    assert {k: files["student_ema.pth"][k] for k in ("arch", "epoch")} == {"arch": "squeezenet_small", "epoch": 2}
    refused = distil(work, "lars", "--optimizer", "adamw", "--ema", 0.9, "--epochs", 3, "--resume")
    assert refused.rc == 2
    assert "it was trained by LARS and --optimizer is AdamW" in refused.err
    assert refused.err.count("\n") == 1


def test_a_part_of_one_image_is_refused(work):
    done = distil(work, "never", "-b", 3, "--micro-batch", 2, student="resnet18")
    assert done.rc == 2
    assert "--micro-batch gives each process one image per step" in done.err
    assert not (work / "never").exists()


def test_a_teacher_may_be_trained_so_too(work):
    well(in_this_process("train_teacher.py", "--data", work / "images", "--arch", "squeezenet_small", "--stem", "cifar",
                         "--output", work / "adamw", "-b", 16, "--bn-parts", 2, "--moco-k", 16, "--epochs", 1, "-p", 1,
                         "--optimizer", "adamw", "--lr", 0.001, "--clip-grad", 1, "--tf32", "all", "--image-size", 32,
                         "--device", "cpu", "--workers", 0))
    state = torch.load(work / "adamw" / "checkpoint.pth", weights_only=True)
    assert state["updater"]["kind"] == "AdamW"
