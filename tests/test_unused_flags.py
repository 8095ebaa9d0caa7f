"""A flag that has no effect beside the others is said; numbers that no one can mean are refused."""

import pytest
from helpers.flags import MINIMAL, parse

from common import cli
from runtime.errors import UserError
from runtime.optimizers import Optimization

DISTIL, TEACHER, LINEAR = ("train_distill",), ("train_teacher",), ("evaluate", "linear")
UNUSED = [  # script, flags, those without an effect, what they are for
    (DISTIL, "--sampler random --nearest-k 15 --total-k=31", "--nearest-k --total-k",
     "with --sampler cf and cluster+cf"),
    (DISTIL, "--sampler random --closek-info x --fark-info y", "--closek-info --fark-info", ""),
    (DISTIL, "--sampler cf --coverage 0.5", "--coverage", "with --sampler cluster+cf"),
    (DISTIL, "--sampler cf --cluster-info c", "--cluster-info", "with --sampler cluster and cluster+cf"),
    (DISTIL, "--loss moco --teacher-stem cifar --teacher-mean 0 0 0 --teacher-std 1 1 1 --teacher-branch b -k resnet50",
     "--teacher-stem --teacher-mean --teacher-std --teacher-branch -k", "with a loss that has a teacher"),
    (DISTIL, "--knn-data x", "--knn-data", "with --knn-every"),
    (TEACHER, "--schedule 3 4", "--schedule", "with --cos false"),
    (TEACHER, "--nonfinite-limit 3", "--nonfinite-limit", "with --on-nonfinite skip"),
    (LINEAR, "--rates 1 2", "--rates", "with --solver sgd and --cached"),
    (LINEAR, "--cached --rates 1 2", "--rates", "with --solver sgd and --cached"),
    (LINEAR, "--cached --lr 3 --wd 0", "--lr --wd", "without --cached"),
    (LINEAR, "--cached -b 3", "-b", "without --cached, or with --solver sgd"),
    (LINEAR, "--solver sgd", "--solver", "with --cached"),
    (("evaluate", "retrieval"), "--data d --scales 1 2 --root x", "--scales --root", "with --datasets"),
    (("evaluate", "retrieval"), "--root x --datasets rparis6k --recall-at 3", "--recall-at", "with --data"),
    (("evaluate", "robustness"), "--epochs 3 -b 9", "--epochs -b", "with --solver sgd"),
    (("evaluate", "transfer"), "--ways 3 --shots 1", "--ways --shots", "with --few-shot"),
    (("evaluate", "transfer"), "--few-shot --skip-linear --jobs 1", "--jobs", "without --skip-linear"),
    (("evaluate", "finetune"), "--schedule 1", "", "")]
USED = [(DISTIL, "--teacher-stem cifar --teacher-branch b -k resnet50"),
        (DISTIL, "--sampler cluster --closek-info clusters.pth"),
        (DISTIL, "--sampler cluster+cf --coverage 0.5 --nearest-k 3 --total-k 7 --closek-info x --cluster-info y"),
        (DISTIL, "--cos false --schedule 3 --knn-every 1 --knn-data x --on-nonfinite skip --nonfinite-limit 3"),
        (LINEAR, "--cached --solver sgd --rates 1 -b 64 --epochs 3"), (LINEAR, "--lr 3 --epochs 9 -b 3"),
        (("evaluate", "retrieval"), "--root x --datasets rparis6k --scales 1 2 --long-side 512"),
        (("evaluate", "robustness"), "--solver sgd --epochs 3 -b 9"),
        (("evaluate", "transfer"), "--few-shot --ways 3 --jobs 1 --iterations 9")]


@pytest.mark.parametrize(("script", "words", "flags", "where"), UNUSED)
def test_what_has_no_effect_is_said_with_what_it_is_for(script, words, flags, where):
    said = cli.unused(parse(script, *words.split()))
    assert {sentence.split()[0] for sentence in said} >= set(flags.split())
    assert all(any(sentence.startswith(flag) for sentence in said) for flag in flags.split())
    assert not flags or f"has no effect: it is used {where}" in said[-1]


@pytest.mark.parametrize(("script", "words"), USED)
def test_what_has_an_effect_is_not(script, words):
    assert cli.unused(parse(script, *words.split())) == []


@pytest.mark.parametrize("case", [case for case in MINIMAL if case != ("evaluate", "all")], ids=" ".join)
def test_nothing_is_said_of_a_plain_command_line(case):
    args = parse(case)
    assert cli.unused(args) == []
    assert "used" not in vars(args)  # which become config.json


@pytest.mark.parametrize("words", ["--beta 0", "--beta -1", "--ema 1", "--momentum 1", "--moco-m 1", "--seed -1",
                                   f"--epochs {'9' * 400}", f"--seed {10**400}", f"--save-every {'9' * 400}",
                                   "--image-cache inf", "--lr nan", "--lr 1e300", "--queue-size 1000000000000",
                                   "--moco-dim 1000000000000", "--image-size 100000", f"--local_rank {10**30}",
                                   "--teacher-mean 123.675 116.28 103.53",
                                   "--teacher-std 58.395 57.12 57.375", "--teacher-std 1e-30 1 1", "-j 1000000",
                                   "--workers 2147483647"])
def test_numbers_that_no_one_can_mean(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(DISTIL, *words.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert words.split()[0] in said.replace("-j/--workers", "-j --workers")
    assert said.count("\n") == 1
    assert len(said) < 300


def test_a_warm_up_that_is_longer_than_the_run():
    Optimization(warmup_epochs=3, epochs=3).check()
    with pytest.raises(UserError, match=r"^--warmup-epochs 4 is more than --epochs 3"):
        Optimization(warmup_epochs=4, epochs=3).check()
