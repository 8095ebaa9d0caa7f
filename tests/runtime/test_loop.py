"""What an epoch says of its data."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime.loop import Trainer


class Loader(list):
    """A loader that has something to say."""

    def __init__(self, repeats, advice):
        super().__init__()
        self.repeats, self.advice = (lambda: repeats), (lambda: advice)


def said(loader, waited):
    lines = []
    log, process = SimpleNamespace(say=lines.append), SimpleNamespace(rank=1)
    run = SimpleNamespace(log=log, output=Path(), process=process, modules={}, epoch=0, on_nonfinite="stop",
                          nonfinite_limit=1)
    Trainer(run, None, loader, 1, 1, None, 1, None)._say_of_data(4, waited)
    return lines


@pytest.mark.parametrize(("waited", "lines"), [(0.0, []), (0.2, []), (0.35, ["epoch 5: 35% of the time was spent "
                                                                            "waiting for data; raise --workers"])])
def test_advice_comes_when_more_than_a_fifth_of_the_time_is_waiting(waited, lines):
    assert said(Loader("", "raise --workers"), waited) == lines


def test_what_the_loader_saved_is_said_once():
    assert said(Loader("3.0% were repeats", ""), 0.9) == ["epoch 5: 3.0% were repeats"]


def test_any_iterable_of_batches_will_do():
    assert said([], 0.9) == []
