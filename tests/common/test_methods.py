"""common/methods.py: what is refused of a method's flags, and which are said to do nothing."""

import pytest
from torch import nn

import train_distill
from common import methods
from models.heads import build_head
from runtime.errors import UserError

COMMON = ["--data", "images", "--distill", "teacher.pth", "--output", "out", "--sampler", "random"]


def parse(names, *more):
    return train_distill.parse_args([*COMMON, "--loss", names, *map(str, more)])


@pytest.mark.parametrize(("names", "more", "words"), [
    ("coss+seed", ["--t-temp", 0.07], ["--t-temp 0.07", "coss, seed", "0.07, 0.0001", "leave it out"]),
    ("seed+coss+disco", ["--s-temp", 0.1], ["--s-temp 0.1", "seed, coss, disco", "0.2, 0.1, 0.2"]),
    ("disco", ["--disco-sum", "--disco-weight", 3], ["--disco-sum", "--disco-weight 3"]),
    ("disco", ["--disco-sum", "--disco-weight", 0], ["--disco-weight 0"]),
    ("coss", ["--l_0", 0, "--l_1", 0], ["--l_0 0 and --l_1 0 leave --loss coss nothing to train on"]),
    ("seed+coss", ["--l_0", 0, "--l_1", 0], ["--l_0 0 and --l_1 0 leave --loss coss nothing"]),
])
def test_refused(names, more, words):
    with pytest.raises(UserError) as error:
        methods.check_loss(parse(names, *more))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(("names", "more"), [
    ("coss+seed", []), ("coss+mse", ["--t-temp", 0.05]), ("coss+dist", ["--l_1", 0.5, "--s-temp", 0.2]),
    ("seed+compress", ["--queue-size", 8]), ("disco", ["--disco-sum"]), ("disco", ["--disco-weight", 3]),
    ("coss", ["--l_0", 0]), ("coss", ["--l_1", 0]), ("seed", ["--l_0", 0, "--l_1", 0]),
])
def test_accepted(names, more):
    methods.check_loss(parse(names, *more))


@pytest.mark.parametrize(("names", "more", "unused"), [
    ("coss", [], []),
    ("seed", ["--l_1", 0], ["--l_1"]),
    ("dinoss", ["--l_0", 1, "--l_1", 1], ["--l_0", "--l_1"]),  # the original's line, and what it meant
    ("coss", ["--disco-weight", 0, "--moco-m", 0.9, "--bn-parts", 4, "--moco-dim", 64],
     ["--disco-weight", "--moco-dim", "--moco-m", "--bn-parts"]),
    ("moco", ["--teacher-bn", "train"], ["--distill", "--teacher-bn"]),
    ("moco", ["--moco-dim", 64, "--moco-m", 0.9, "--bn-parts", 4], ["--distill"]),
    ("disco", ["--teacher-bn", "train", "--moco-m", 0.9], []),
])
def test_unused(names, more, unused):
    found = methods.unused(parse(names, *more), nn.Identity())
    assert found == [f"{flag} is not used by --loss {names}" for flag in unused]


@pytest.mark.parametrize(("name", "out", "used"), [
    ("none", 8, False), ("linear", 4, False), ("projection", 8, False), ("projection", 4, True), ("mlp", 4, True)])
def test_head_bn_is_used_where_a_head_has_it(name, out, used):
    head = build_head(name, 8, out, batch_norm=True)
    assert bool(methods.unused(parse("coss", "--head-bn"), head)) != used
