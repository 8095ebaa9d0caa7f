"""Every method and some sums by the real script, at 32 pixels: that it runs, learns, is recorded, and goes on."""

import json

import numpy as np
import pytest
import torch
from helpers.compare import differences
from helpers.methods import SUMS, flags
from helpers.runs import load, metrics
from helpers.scripts import at, in_this_process, script, well

from losses import LOSSES, needs_of

WITH_QUEUE = {"seed": ["queue"], "compress": ["ours", "theirs"], "bingo": ["queue"], "disco": ["queue"],
              "moco": ["queue"]}

RATES = {"seed": 0.03 / 256, "compress": 0.01 / 256, "bingo": 0.03 / 512, "disco": 0.03 / 256, "moco": 0.03 / 256,
         "smd": 0.1 / 512}  # of an image, in their papers; CoSS's for the others


@pytest.mark.parametrize("names", [*LOSSES, *SUMS])
def test_every_method_runs(names, method_files):
    folder = names.replace("+", "_")
    well(in_this_process("train_distill.py", *flags(method_files, names, folder)))
    lines = metrics(method_files / folder)
    assert len(lines) == (8 if needs_of(names).pairs else 4)
    assert all(np.isfinite(line["loss"]) for line in lines)
    state = load(method_files / folder / "checkpoint.pth")
    queues = [f"losses.{name}.{queue}" for name in names.split("+") for queue in WITH_QUEUE.get(name, [])]
    assert sorted(state.get("loss", {})) == sorted(f"{queue}.{what}" for queue in queues for what in ("items", "count"))
    for queue in queues:  # both epochs' images, or the anchors alone of pairs
        assert state["loss"][f"{queue}.count"] == 24
    assert ("momentum" in state) == needs_of(names).momentum
    config = json.loads((method_files / folder / "config.json").read_text())
    assert set(config["losses"]) == set(names.split("+"))
    images = config["batch_size"] * (1 + config["nearest_k"] * (config["sampler"] == "cf"))
    assert config["lr"] == pytest.approx(images * min(RATES.get(name, 0.03 / 1024) for name in names.split("+")))
    if names == "coss+seed":
        assert {"coss/row", "coss/space", "coss/loss", "seed/loss", "seed/entropy"} <= set(lines[0])
        for line in lines:
            assert line["loss"] == pytest.approx(line["coss/loss"] + 0.5 * line["seed/loss"], rel=1e-5)


@pytest.mark.parametrize("names", ["bingo", "disco", "compress"])
def test_stopped_in_mid_epoch_it_ends_as_if_nothing_had_been(names, method_files):
    """The queue, the momentum student, CutMix's draws and the teacher's batch statistics among what goes on."""
    straight, cut = f"{names}_straight", f"{names}_cut"
    more = ["--teacher-bn", "train", "--warmup-epochs", 0]
    well(in_this_process("train_distill.py", *flags(method_files, names, straight, *more)))
    for plan in ("0:0:1:TERM", "0:0:3:TERM"):
        assert at(plan, "train_distill.py", *flags(method_files, names, cut, *more)).rc == 75
    well(in_this_process("train_distill.py", *flags(method_files, names, cut, *more)))
    assert differences(method_files / straight, method_files / cut) == []
    one, two = (load(method_files / folder / "checkpoint.pth") for folder in (straight, cut))
    for part in ("state_dict", "loss", *(["momentum"] if needs_of(names).momentum else [])):
        assert one[part].keys() == two[part].keys()
        for key, value in one[part].items():
            assert torch.equal(value, two[part][key]), key


def test_two_processes_train_as_one(method_files):
    """A student without batch norm, so that nothing depends on who has which image: losses, queue and weights."""
    well(in_this_process("train_distill.py", *flags(method_files, "disco", "disco_one", "--epochs", 1)))
    well(script("train_distill.py", *flags(method_files, "disco", "disco_two", "--epochs", 1), processes=2))
    for name in ("loss", "moco", "distance"):
        one, two = ([line[name] for line in metrics(method_files / folder)] for folder in ("disco_one", "disco_two"))
        assert two == pytest.approx(one, rel=1e-3), name
    one, two = (load(method_files / folder / "checkpoint.pth") for folder in ("disco_one", "disco_two"))
    assert two["loss"]["losses.disco.queue.count"] == 12
    for part in ("state_dict", "loss", "momentum"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("names", "more", "words"), [
    ("bingo", ["--nearest-k", 2], ["--loss bingo", "pairs", "--nearest-k 2", "--nearest-k 1"]),
    ("bingo", ["--sampler", "random"], ["--loss bingo", "--sampler random", "--sampler cf"]),
    ("bingo+coss", [], ["--loss", "bingo+coss", "pairs", "single images"]),
    ("coss", ["--loss-weights", "1,2"], ["--loss-weights", "holds 2", "names 1"]),
    ("coss", ["--loss-weights", "1,x"], ["--loss-weights"]),
    ("seed", ["--distill", "{work}/headless.pth"], ["headless.pth", "has no head"]),
])
def test_what_is_refused(names, more, words, method_files):
    state = {k: v for k, v in load(method_files / "teacher.pth")["state_dict"].items() if ".fc." not in k}
    torch.save({"arch": "shufflenet_small", "stem": "cifar", "image_size": 32, "state_dict": state},
               method_files / "headless.pth")
    more = [str(x).format(work=method_files) for x in more]
    line = flags(method_files, names if names != "bingo+coss" else "bingo", "refused", *more)
    line[line.index("--loss") + 1] = names
    done = in_this_process("train_distill.py", *line)
    assert done.rc == 2, done.out + done.err
    assert done.err.count("\n") == 1
    for word in words:
        assert word in done.err
    assert not (method_files / "refused").exists()


def test_a_teacher_is_asked_for_by_name_and_ignored_where_none_is_needed(method_files):
    line = flags(method_files, "coss", "refused")
    del line[line.index("--distill"):line.index("--distill") + 2]
    done = in_this_process("train_distill.py", *line)
    assert done.rc == 2
    assert "--loss coss needs --distill" in done.err
    line = flags(method_files, "moco", "alone", "--distill", method_files / "teacher.pth", "--epochs", 1, "--smd-tau",
                 1, "--l_0", 2)
    done = well(in_this_process("train_distill.py", *line))
    for words in ("--distill", "--smd-tau", "--l_0"):
        assert f"{words} is not used by --loss moco" in done.out
    assert "--queue-size is" not in done.out
