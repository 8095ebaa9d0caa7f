"""scripts/methods.sh: every method's line is a command line that train_distill.py takes, with the paper's numbers."""

import os
import subprocess
from pathlib import Path

import pytest
from helpers.interpreter import warm_python

import train_distill
from common.methods import options
from losses import LOSSES, build_objective, tables

ROOT = Path(__file__).resolve().parent.parent
# The script itself, with the launcher replaced by one that prints the command line.
SHOW = """source() { :; }; environment() { :; }; launch() { echo "$1" >&2; shift 2; printf '%s\\n' "$@"; }
. scripts/methods.sh "$@"
"""


def command_line(*words):
    return subprocess.run(["bash", "-c", SHOW, "bash", *words], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHON": warm_python()})


def words_of(name, student="resnet18", *more):
    """As scripts/methods.sh puts the command line together, in this process."""
    (gpus, *files), *flags = [tables.recipe_lines(name, student)[0].split(), *tables.recipe_lines(name, student)[1:]]
    given = {"teacher": ["-k", "resnet50", "--distill", "weights/moco_v2_200ep_pretrain.pth.tar"],
             "neighbours": ["--closek-info", "weights/moco_v2_resnet50/closek_info.npy"]}
    return gpus, ["--data", "/data/imagenet/train", "--output", f"runs/{name}_{student}",
                  *(word for file in files for word in given[file]), *flags, "--aug", "moco_v2", "--momentum", "0.9",
                  "--cos", "-p", "1000", *more]


def parsed(*words):
    args = train_distill.parse_args(words_of(*words)[1])
    args.checks = {}  # its files are not here
    train_distill.check_flags(args)
    return args


@pytest.mark.parametrize("words", [("moco",), ("bingo", "efficientnet_b0", "--amp", "bf16")])
def test_the_script_gives_the_recipe(words):
    done, (gpus, expected) = command_line(*words), words_of(*words)
    assert (done.returncode, done.stdout.splitlines(), done.stderr.strip()) == (0, expected, gpus)


@pytest.mark.parametrize("name", LOSSES)
def test_every_method_has_a_line(name):
    args = parsed(name)
    assert (args.loss, args.student_arch, args.output) == (name, "resnet18", f"runs/{name}_resnet18")
    assert bool(args.distill) == (name != "moco")


def test_processes_of_the_originals():
    """Terms over each process's batch are other terms at another number of them."""
    found = {name: int(words_of(name)[0]) for name in LOSSES}
    eight = {"seed", "bingo", "disco", "smd", "moco", "compress"}
    assert found == {name: 8 if name in eight else 4 for name in LOSSES}


PUBLISHED = {  # method, student -> flags, settings
    ("seed", "resnet18"): ({"lr": 0.03, "batch_size": 256, "epochs": 200, "sampler": "random", "weight_decay": 1e-4},
                           {"queue_size": 65536, "s_temp": 0.2, "t_temp": 1e-4}),
    ("bingo", "resnet34"): ({"lr": 0.03, "batch_size": 256, "nearest_k": 1, "total_k": 5, "weight_decay": 1e-4},
                            {"s_temp": 0.2, "bingo_alone": 11}),
    ("bingo", "efficientnet_b0"): ({"weight_decay": 4e-5, "teacher_bn": "train"}, {"s_temp": 0.12}),
    ("disco", "resnet18"): ({"lr": 0.03, "batch_size": 256, "epochs": 200, "moco_m": 0.999, "teacher_bn": "train"},
                            {"s_temp": 0.2, "disco_weight": 32}),
    ("smd", "resnet18"): ({"lr": 0.1, "batch_size": 512, "epochs": 100, "warmup_epochs": 0},
                           {"smd_tau": 0.04, "smd_batch": "local"}),
    ("smd", "efficientnet_b0"): ({}, {"smd_tau": 0.004}),
    ("moco", "resnet18"): ({"lr": 0.03, "batch_size": 256, "moco_dim": 128, "moco_m": 0.999}, {"s_temp": 0.2}),
    ("coss", "resnet18"): ({"lr": 0.03, "batch_size": 64, "nearest_k": 15, "total_k": 31, "epochs": 25},
                           {"l_0": 1, "l_1": 1, "s_temp": 0.1, "t_temp": 0.07}),
}


@pytest.mark.parametrize(("method", "student"), PUBLISHED)
def test_the_papers_numbers(method, student):
    flags, settings = PUBLISHED[method, student]
    args = parsed(method, student)
    found = build_objective(args.loss, args.loss_weights, args.beta, **options(args)).losses[args.loss].settings
    assert {name: getattr(args, name) for name in flags} == flags
    assert {name: found[name] for name in settings} == settings


def test_further_flags_are_handed_on():
    assert parsed("seed", "resnet34", "--amp", "bf16", "--lr", "0.06").lr == 0.06


@pytest.mark.parametrize("words", [["sed"], ["seed", "--amp", "bf16"]])
def test_wrong_words(words):
    done = command_line(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
