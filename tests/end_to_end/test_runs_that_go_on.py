"""Runs that are stopped, killed or broken, and go on: the real scripts, compared with an undisturbed run to the bit."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torchvision
from helpers.compare import differences, metrics
from helpers.images import render_classes
from helpers.runs import load
from helpers.scripts import AT_STEP, at, in_this_process, script, well

ARCH = "squeezenet_small"


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    render_classes(root, 10)
    return root


@pytest.fixture(scope="session")
def flags(tree, tmp_path_factory):
    """10 steps an epoch, 2 epochs, anchors with neighbours, lines that do not divide an epoch, batch norm."""
    work = tmp_path_factory.mktemp("flags")
    torch.manual_seed(0)
    torch.save({"arch": ARCH, "image_size": 32, "state_dict": torchvision.models.get_model(ARCH).state_dict()},
               work / "teacher.pth")
    others = np.random.default_rng(1).permuted(np.tile(np.arange(1, 40), (40, 1)), axis=1)[:, :6]
    np.save(work / "near.npy", (np.arange(40)[:, None] + others) % 40)
    return ["--data", tree, "--distill", work / "teacher.pth", "-a", "shufflenet_small", "--stem", "cifar",
            "--sampler", "cf", "--closek-info", work / "near.npy", "--nearest-k", 1, "--total-k", 6, "-b", 4,
            "--epochs", 2, "-p", 3, "--lr", 0.004, "--image-size", 32, "--device", "cpu"]


@pytest.fixture(scope="session")
def run(flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    well(in_this_process("train_distill.py", *flags, "--output", output, "--workers", 0))
    return output


# ---- one process


def test_stopped_by_signals_in_mid_epoch_it_ends_as_if_nothing_had_been(run, flags, tmp_path):
    """Three signals, before the first step among them, with workers whose prefetched batches must not be lost."""
    output = tmp_path / "out"
    command = ["train_distill.py", *flags, "--output", output]
    for plan, workers, steps in (("0:0:0:INT", 0, 0), ("0:0:4:TERM", 1, 4), ("0:0:17:USR1", 1, 17)):
        done = at(plan, *command, "--workers", workers)
        assert done.rc == 75, done.out + done.err
        assert done.err == ""
        assert "start the same command again" in done.out
        assert load(output / "checkpoint.pth")["steps"] == steps
        assert not (output / "run.lock").exists()
    done = well(in_this_process(*command, "--workers", 0))
    assert "at epoch 2, step 8" in done.out
    assert differences(run, output) == []


def test_killed_between_saves_it_goes_on_from_the_last_whole_checkpoint(run, flags, tmp_path):
    """What was written beyond it is dropped; the newest, cut short with the machine, is named and passed over."""
    output = tmp_path / "out"
    command = ["train_distill.py", *flags, "--output", output, "--workers", 0, "--save-every", "4"]
    with pytest.raises(ZeroDivisionError):
        at("0:0:19:RAISE", *command)
    assert metrics(output)[-1]["step"] == 19
    newest = output / "checkpoint.pth"
    assert load(newest)["steps"] == 16
    newest.write_bytes(newest.read_bytes()[:-1000])
    done = well(in_this_process(*command))
    assert f"{newest} is damaged" in done.out
    assert "resuming from" in done.out
    assert "checkpoint-000000012.pth at epoch 2, step 3" in done.out
    assert differences(run, output) == []


def test_a_teachers_run_goes_on_too(tree, tmp_path):
    """A queue, a momentum encoder, and batches shuffled with the global random numbers."""
    flags = ["--data", tree, "--arch", ARCH, "--stem", "cifar", "-b", 8, "--bn-parts", 2, "--moco-k", 16, "--epochs", 2,
             "-p", 2, "--device", "cpu", "--image-size", 32, "--workers", 0]
    well(in_this_process("train_teacher.py", *flags, "--output", tmp_path / "calm"))
    for step in (3, 7):
        assert at(f"0:0:{step}:TERM", "train_teacher.py", *flags, "--output", tmp_path / "wild").rc == 75
    well(in_this_process("train_teacher.py", *flags, "--output", tmp_path / "wild"))
    assert differences(tmp_path / "calm", tmp_path / "wild") == []


def test_a_signal_after_the_last_step_lets_the_run_end(flags, tmp_path, monkeypatch):
    from runtime.run import Run

    save = Run.save

    def signalled(self, epoch, exports):
        os.kill(os.getpid(), 15)
        save(self, epoch, exports)

    monkeypatch.setattr(Run, "save", signalled)
    well(in_this_process("train_distill.py", *flags, "--epochs", 1, "--workers", 0, "--output", tmp_path / "out"))
    assert (tmp_path / "out" / "student.pth").exists()


def test_a_run_never_overwrites_its_own_teacher_or_another_run(run, flags, tree, tmp_path):
    """The teacher in the folder under the name of a result; and a finished run without its checkpoints."""
    student, teacher = tmp_path / "run", tmp_path / "teacher"
    student.mkdir()
    teacher.mkdir()
    for path in (student / "student.pth", teacher / "teacher.pth"):
        shutil.copy(flags[3], path)
    before = (student / "student.pth").read_bytes()
    moco = ["train_teacher.py", "--data", tree, "--arch", ARCH, "-b", 8, "--moco-k", 16, "--device", "cpu",
            "--image-size", 32, "--workers", 0]
    distil = ["train_distill.py", *flags, "--workers", 0]
    for command, path, words in (
            ([*distil, "--distill", student / "student.pth"], student / "student.pth",
             "--distill {path} is the file student.pth that this run would write"),
            (distil, student / "student.pth", "holds student.pth, which no such run wrote"),
            (moco, teacher / "teacher.pth", "holds teacher.pth, which no such run wrote")):
        done = in_this_process(*command, "--output", path.parent)
        assert done.rc == 2, done.out + done.err
        assert words.format(path=path) in done.err
        assert [x.name for x in path.parent.iterdir()] == [path.name]
        assert path.read_bytes() == before

    left = shutil.copytree(run, tmp_path / "left")
    for path in left.glob("checkpoint*.pth"):
        path.unlink()
    (left / "config.json").unlink()
    before = {path.name: path.read_bytes() for path in left.iterdir()}
    for more, words in ((["--lr", 0.01], "lr was 0.004, now 0.01"), ([], "after 2 epochs but no checkpoint")):
        done = in_this_process(*distil, "--output", left, *more)
        assert done.rc == 2, done.out + done.err
        assert words in done.err
        assert {path.name: path.read_bytes() for path in left.iterdir()} == before


def test_a_config_that_was_deleted_is_compared_and_written_again(run, flags, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "config.json").unlink()
    done = in_this_process("train_distill.py", *flags, "--output", copy, "--workers", 0, "--lr", 0.01)
    assert (done.rc, "lr was 0.004, now 0.01" in done.err) == (2, True), done.err
    assert not (copy / "config.json").exists()
    well(in_this_process("train_distill.py", *flags, "--output", copy, "--workers", 0))
    config = json.loads((copy / "config.json").read_text())
    assert (config["lr"], len(config["starts"])) == (0.004, 1)


def test_a_folder_in_use_is_refused(run, flags, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    holder = subprocess.Popen([sys.executable, "-c", f"import fcntl, time; f = open('{copy}/run.lock', 'w'); "
                               "fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"],
                              stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        done = in_this_process("train_distill.py", *flags, "--output", copy, "--workers", 0)
    finally:
        holder.kill()
        holder.communicate()
    assert done.rc == 2
    assert f"--output {copy} is in use" in done.err
    (copy / "run.lock").unlink()
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


# ---- two processes


def test_two_processes_one_killed_restarted_stopped_and_gone_on(flags, tmp_path):
    """torchrun starts the job again after a rank was killed; then one rank alone is asked to stop."""
    command = ["train_distill.py", *flags, "--workers", 0, "--save-every", "5"]
    well(script(*command, "--output", tmp_path / "calm", processes=2))
    done = well(script(AT_STEP, "0:1:12:KILL,1:1:17:USR1", *command, "--output", tmp_path / "wild", processes=2,
                         restarts=2))
    assert "at epoch 2, step 1\n" in done.out  # after the kill, from the checkpoint at step 10
    assert "stopped by SIGUSR1 before step 8 of epoch 2" in done.out
    assert load(tmp_path / "wild" / "checkpoint.pth")["steps"] == 17
    well(script(*command, "--output", tmp_path / "wild", processes=2))
    assert differences(tmp_path / "calm", tmp_path / "wild") == []


def test_a_dead_rank_ends_the_job_within_a_minute_with_its_own_error_at_the_top(flags, tmp_path):
    began = time.monotonic()
    done = script(AT_STEP, "0:1:5:KILL", "train_distill.py", *flags, "--workers", 0, "--output", tmp_path / "out",
                    processes=2)
    assert done.rc != 0
    assert time.monotonic() - began < 60
    root = done.err.partition("Root Cause")[2]
    assert re.search(r"rank +: 1 ", root)
    assert "Signal 9 (SIGKILL)" in root
    assert done.err.count("Traceback (most recent call last)") == 1, "torchrun's own alone"
    assert "Connection closed by peer" not in done.err


def test_an_image_that_is_broken_for_one_rank_ends_all_with_that_sentence(flags, tree, tmp_path):
    broken = shutil.copytree(tree, tmp_path / "tree")
    (broken / "class2" / "3.jpg").write_bytes(b"no image")
    done = script("train_distill.py", *flags, "--data", broken, "--sampler", "random", "--workers", 1, "--output",
                    tmp_path / "out", processes=2)
    said = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.err
    assert str(broken / "class2" / "3.jpg") in said[0]
    assert "--on-bad-image skip" in said[0]
    assert done.err.count("Traceback (most recent call last)") == 1, "torchrun's own alone"


def test_another_number_of_processes(flags, tmp_path):
    """Two, then one: the same steps of the same images, and the same loss where it does not depend on the number."""
    command = ["train_distill.py", *flags, "--workers", 0, "--space-batch", "global", "-p", 1, "--output"]
    stopped = script(AT_STEP, "0:0:5:TERM", *command, tmp_path / "wild", processes=2)
    assert stopped.rc == 1  # torchrun's word for its processes' 75
    done = well(in_this_process(*command, tmp_path / "wild"))
    assert "had 2 processes and now has 1" in done.out
    lines = metrics(tmp_path / "wild")
    assert [line["step"] for line in lines if line["group"] == "train"] == list(range(1, 21))
    shown, = {line["images"] for line in lines if line["group"] == "sampler"}
    assert shown == 80
