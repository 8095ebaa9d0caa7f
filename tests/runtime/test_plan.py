"""What the log says of a run's length: at the start, and after the first steps."""

import math

import pytest
import torch

from runtime import device, loop
from runtime.errors import UserError
from runtime.log import duration
from runtime.numbers import amount


class Log(list):
    say = list.append


def trainer_of(epochs, seconds, monkeypatch):
    """A Trainer of which only what speaks of the plan is there; the clock is at ``seconds`` a step."""
    made = loop.Trainer.__new__(loop.Trainer)
    process = device.Process(0, 1, torch.device("cpu"))
    made.run = type("Run", (), {"log": Log(), "process": process})()
    made.epochs, made.done, made.warm = epochs, 0, 0.0
    monkeypatch.setattr(loop.time, "monotonic", lambda: 7.0 + seconds * made.done)
    return made


@pytest.mark.parametrize(("epochs", "steps", "epoch", "first", "said"), [
    (25, 100_000_000, 0, 0, "plan: 2,499,999,988 steps are left, 416,666h39m at the pace of the first ones"),
    (3, 20, 1, 5, "plan: 23 steps are left, 0m13s at the pace of the first ones"), (1, 12, 0, 0, None)])
def test_hours_after_the_first_steps(epochs, steps, epoch, first, said, monkeypatch):
    trainer = trainer_of(epochs, 0.6, monkeypatch)
    for step in range(first, first + 14 if steps > 12 else steps):
        trainer.done += 1
        trainer._say_hours(trainer._left(epoch, step + 1, steps))
    assert trainer.run.log == ([said] if said else [])


def test_a_line_is_short_and_comes_after_the_first_step_and_after_a_minute(monkeypatch):
    """Steps of 25 seconds, reported every 100: at step 1, and from then on when more than 60 seconds have passed."""
    trainer = trainer_of(400, 25, monkeypatch)
    trainer.began, trainer.said, lines = 7.0, -math.inf, []
    monkeypatch.setattr(loop, "SILENCE", 60.0)
    values = {"loss": -285.71428, "row": -142.85, "space": -142.86, "student_norm": 123456.78, "row_cosine": 0.99123,
              "dim_correlation": 0.5, "lr": 0.0031415, "images_per_second": 31234.5, "data_wait": 0.25}
    for step in range(1, 9):
        trainer.done = step
        if trainer._is_due():
            trainer._say(24, step, 100_000, values)
            lines.append(step)
    assert lines == [1, 4, 7]
    assert trainer.run.log[1] == ("epoch 25/400 step 4/100000: loss -285.7 cosine 0.991 norm 1.23e+05 lr 0.00314 "
                                  "31,234 img/s waits 25% eta 261,111h05m")
    short = {"loss": -285.71428, "student_norm": 1234.5, "row_cosine": 0.99123, "lr": 0.03, "images_per_second": 1234.5,
             "data_wait": 0.01}
    trainer.epochs, trainer.began = 25, loop.time.monotonic() - 6  # 8 steps took 6 seconds
    trainer._say(10, 5000, 20018, short)
    assert len(trainer.run.log[-1]) < 100


def test_amounts_and_durations_in_words():
    assert [amount(x) for x in (0, 999, 2000, 4_100_000, 2e12)] == ["0 bytes", "999 bytes", "2.0 kB", "4.1 MB",
                                                                    "2,000.0 GB"]
    assert [duration(x) for x in (0, 187, 3720, 4_586_400)] == ["0m00s", "3m07s", "1h02m", "1,274h00m"]


def test_memory_that_is_not_there_is_asked_for_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda _: 5_000_000)
    device.need_memory(5_000_000, "--moco-k 3")
    with pytest.raises(UserError, match=r"^--moco-k 3 takes 5.1 MB of memory and 5.0 MB are free; give less$"):
        device.need_memory(5_100_000, "--moco-k 3")


def test_queues_name_their_flag(monkeypatch):
    from losses.queue import Queue
    from models.backbones import build_backbone
    from models.moco_pretraining import MoCoEncoders
    with pytest.raises(UserError, match=r"^--queue-size 2000000000 of 128 numbers each takes [\d,.]+ GB of memory"):
        Queue(2_000_000_000, 128)
    backbone = build_backbone("shufflenet_v2_x0_5", "imagenet", 64)
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=r"^--moco-dim 2000000000 takes"):
        MoCoEncoders(backbone, moco_dim=2_000_000_000)
    assert torch.equal(state, torch.get_rng_state())
