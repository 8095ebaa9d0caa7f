"""What the log says of a run's length: at the start, and after the first steps."""

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
    made.run, made.epochs, made.done, made.warm = type("Run", (), {"log": Log()})(), epochs, 0, 0.0
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
