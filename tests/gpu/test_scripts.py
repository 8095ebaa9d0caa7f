"""The scripts on a GPU as a person starts them: a whole small experiment, what ends it early, and what is refused."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.runs import load, metrics
from helpers.scripts import AT_STEP, ROOT, at, in_this_process, launched, script, well

STUDENT = "shufflenet_v2_x0_5"


@pytest.fixture
def line(tree, teacher, neighbours, device):
    """A training line without --output: 2 epochs of 10 steps of 16 images."""
    return ["--data", tree / "train", "-a", STUDENT, "--distill", teacher, "--sampler", "cf", "--closek-info",
            neighbours, "--nearest-k", 3, "--total-k", 6, "-b", 4, "--epochs", 2, "-p", 1, "--lr", 0.001,
            "--image-size", 32, "--workers", 0, "--device", device]


def amp_for(amp, device):
    """``amp``, unless it takes a GPU and there is none."""
    if amp == "fp16" and device.type == "cpu":
        pytest.skip("fp16 needs a GPU")
    return amp


def losses_of(folder):
    return [entry["loss"] for entry in metrics(folder)]


@pytest.mark.parametrize("amp", ["fp16", "bf16", "off"])
def test_a_whole_experiment(amp, line, tree, teacher, device, tmp_path):
    """Mined, distilled, killed and gone on with, scored: all on the device."""
    common = ["--device", device, "--workers", 0]
    well(in_this_process("compute_knn.py", "mine", "--data", tree / "train", "--weights", teacher, "--output",
                         tmp_path / "nn", "--k", 12, *common))
    assert np.load(tmp_path / "nn/closek_info.npy").shape == (40, 12)
    more = [*line, "--closek-info", tmp_path / "nn/closek_info.npy", "--amp", amp_for(amp, device), "--save-every", 3,
            "--output", tmp_path / "run"]
    killed = script(AT_STEP, "0:0:5:KILL", "train_distill.py", *more)
    assert killed.rc == -9, killed.err
    well(in_this_process("train_distill.py", *more))
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == list(range(1, 21))
    assert np.isfinite(losses_of(tmp_path / "run")).all()
    assert bool(load(tmp_path / "run/checkpoint.pth")["updater"]["scaler"]) == (amp == "fp16")
    done = well(in_this_process("compute_knn.py", "eval", "--data", tree, "--weights", tmp_path / "run/student.pth",
                                "--k", 10, "--json", *common))
    assert '"top1"' in done.out


def test_gone_on_with_it_ends_where_it_would_have_ended(line, tmp_path):
    """A GPU adds in no fixed order, so the same to within a tolerance: of losses, weights and the scaler."""
    well(in_this_process("train_distill.py", *line, "--output", tmp_path / "straight"))
    assert at("0:0:7:TERM", "train_distill.py", *line, "--output", tmp_path / "cut").rc == 75
    well(in_this_process("train_distill.py", *line, "--output", tmp_path / "cut"))
    assert losses_of(tmp_path / "cut") == pytest.approx(losses_of(tmp_path / "straight"), rel=5e-2)
    one, two = (load(tmp_path / name / "checkpoint.pth") for name in ("straight", "cut"))
    assert one["updater"]["scaler"] == two["updater"]["scaler"]
    for key, value in one["state_dict"].items():
        if value.is_floating_point():
            assert (value - two["state_dict"][key]).norm() <= 0.05 * value.norm() + 1e-3, key


@pytest.mark.parametrize("more", [["--cache", "device"], ["--cache", "host"], ["--micro-batch", "8"],
                                  ["--optimizer", "lars", "--clip-grad", "1"], ["--optimizer", "adamw", "--ema", "0.9"],
                                  ["--on-nonfinite", "skip"], ["--sync-bn"], ["--tf32", "all", "--amp", "off"],
                                  ["--workers", "2"]], ids=" ".join)
def test_what_the_flags_for_speed_and_memory_do_there(more, line, tmp_path):
    if "--workers" in more:  # forked from a process of its own, as the script's are
        well(script("train_distill.py", *line, *more, "--epochs", 1, "--output", tmp_path / "run"))
    else:
        well(in_this_process("train_distill.py", *line, *more, "--epochs", 1, "--output", tmp_path / "run"))
    assert np.isfinite(losses_of(tmp_path / "run")).all()


def test_compiled(gpu, line, tmp_path):
    """The first loss is the eager one's; torch.compile may add in another order."""
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        well(launched("train_distill.py", *line, *more, "--epochs", 1, "--amp", "off", "--tf32", "off", "--output",
                      tmp_path / name))
    assert losses_of(tmp_path / "compiled")[0] == pytest.approx(losses_of(tmp_path / "eager")[0], rel=1e-3)


def test_a_teacher_is_trained(tree, device, tmp_path):
    well(in_this_process("train_teacher.py", "--data", tree / "train", "--arch", STUDENT, "--stem", "cifar", "-b", 8,
                         "--image-size", 32, "--bn-parts", 2, "--moco-k", 16, "--epochs", 1, "-p", 1, "--workers", 0,
                         "--device", device, "--output", tmp_path / "teacher"))
    assert np.isfinite(losses_of(tmp_path / "teacher")).all()


# ---- processes


def test_one_process_under_torchrun(line, tmp_path):
    well(launched("train_distill.py", *line, "--epochs", 1, "--output", tmp_path / "run", processes=1))


def test_two_processes_on_one_gpu_are_refused_in_a_sentence(line, tmp_path, monkeypatch, device):
    """NCCL cannot; gloo can, on the CPU, where the same line is served."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    done = launched("train_distill.py", *line, "--epochs", 1, "--output", tmp_path / "run", processes=2)
    if device.type == "cuda":
        assert done.rc == 1  # torchrun's
        assert "asks for GPU 1, counted from 0, but this machine shows 1 GPU(s)" in done.err
        assert not (tmp_path / "run").exists()
    else:
        well(done)


COLLECTIVES = """
import sys, tempfile, torch, torch.distributed as dist
from runtime import device as ours
from runtime.agreement import all_reduce_max
where = torch.device(sys.argv[1])
if where.type == "cuda":
    torch.cuda.set_device(0)
    where = torch.device("cuda", 0)
dist.init_process_group("nccl" if where.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
process = ours.Process(0, 2, where, dist.new_group(backend="gloo"))
x = torch.arange(6.0, device=where).view(3, 2)
for found in (ours.all_gather(x), ours.all_reduce_mean(x), ours.all_reduce_sum(x), ours.broadcast(x.clone())):
    assert torch.equal(found, x), found
assert ours.gather_objects({"a": 1}) == [{"a": 1}] and all_reduce_max([3, 4], process) == [3, 4]
ours.barrier()
net = ours.wrap(torch.nn.Linear(2, 2).to(where), process)
net(x).sum().backward()
assert type(net).__name__ == "DistributedDataParallel" and net.module.weight.grad.abs().sum() > 0
dist.destroy_process_group()
print("served")
"""


def test_collectives_and_gradients_in_a_group_of_one(device):
    """NCCL on a GPU: the group, our collectives, DistributedDataParallel's gradients."""
    done = subprocess.run([sys.executable, "-c", COLLECTIVES, str(device)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.endswith("served\n"), done.stderr


# ---- what is refused


def one_sentence(done, *words):
    assert done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in words), done.err


def test_a_gpu_that_is_not_there(line, tmp_path):
    done = in_this_process("train_distill.py", *line, "--device", "cuda:99", "--output", tmp_path / "run")
    assert done.rc == 2
    one_sentence(done, "--device cuda:99", "asks for GPU 99", "CUDA_VISIBLE_DEVICES")
    assert not (tmp_path / "run").exists()


def test_gpus_that_are_hidden(line, tmp_path, monkeypatch):
    """CUDA_VISIBLE_DEVICES without a GPU: --device cuda is refused and auto is the CPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = script("train_distill.py", *line, "--device", "cuda", "--output", tmp_path / "run")
    assert done.rc == 2
    one_sentence(done, "--device cuda", "shows 0 GPU(s)")
    done = well(script("train_distill.py", *line, "--device", "auto", "--epochs", 1, "--output", tmp_path / "run"))
    assert "1 x cpu" in done.out


def test_memory_that_runs_out(gpu, line, tmp_path):
    """The GPU's, made small for this process: a sentence that names --micro-batch, which then helps."""
    held = torch.empty(1, device=gpu)  # the fraction is of a context that is there
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(gpu).total_memory
    big = ["--image-size", "224", "-a", "resnet18", "--amp", "off", "--epochs", 1, "-b", 8, "--epoch-steps", 2]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved(gpu) + (300 << 20)) / total), gpu)
    try:
        done = in_this_process("train_distill.py", *line, *big, "--output", tmp_path / "run")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)
        torch.cuda.empty_cache()
        del held
    assert done.rc == 3, done.err
    one_sentence(done, "the GPU's memory is too small", "--micro-batch")
