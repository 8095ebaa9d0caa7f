"""Plain pickles are read, and nothing in them runs. (Checkpoints: tests/models/test_safe_load.py.)"""

import io
import os
import pickle

import numpy as np
import pytest

from runtime.inert import plain_pickle

PLAIN = {"names": ["a", "b"], "boxes": np.array([[1.5, 2]]), "ids": np.arange(3), "one": np.int64(4), "none": None}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numbers_texts_arrays_and_containers(protocol):
    found = plain_pickle(io.BytesIO(pickle.dumps(PLAIN, protocol)))
    assert found.keys() == PLAIN.keys()
    assert (found["names"], found["one"], found["none"]) == (["a", "b"], 4, None)
    assert found["boxes"].tolist() == [[1.5, 2]]
    assert found["ids"].tolist() == [0, 1, 2]


class Touches:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_anything_else_is_named_and_does_not_run(tmp_path):
    path = str(tmp_path / "made")
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        plain_pickle(io.BytesIO(pickle.dumps({**PLAIN, "more": Touches(path)})))
    assert not list(tmp_path.iterdir())
