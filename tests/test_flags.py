"""Flags that are all read and explained, the original's spellings, and the papers' defaults."""

import argparse
import ast
import importlib
import re

import pytest
from helpers.flags import MINIMAL, ROOT_SCRIPTS, SHARED, all_parsers, parse, parsed, parser_of
from helpers.interpreter import ROOT

from common import cli, methods
from losses import build_loss, recipe_of
from runtime.optimizers import Optimization


def read_names(path):
    """Names read as args.NAME or getattr(args, "NAME") in a file."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
            names.add(node.attr)
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"
                and isinstance(node.args[0], ast.Name) and node.args[0].id == "args"
                    and isinstance(node.args[1], ast.Constant)):
            names.add(node.args[1].value)
    return names


def test_every_script_has_a_minimal_command_line():
    with_flags = {name for name in ROOT_SCRIPTS if "parse_args" in (ROOT / f"{name}.py").read_text()}
    assert with_flags == {case[0] for case in MINIMAL}
    assert MINIMAL["compute_knn", "cluster"][::2] == ["--data", "--weights", "--output", "--num-clusters"]
    assert MINIMAL["evaluate", "robustness"][-2:] == ["--ood", "1=1"]
    assert MINIMAL["inspect_checkpoint",] == ["1"]


@pytest.mark.parametrize("case", MINIMAL, ids=" ".join)
def test_no_flag_is_read_by_nothing(case):
    names = [case[0], *(f"{SHARED}/{path.stem}" for path in (ROOT / SHARED).glob("*.py")
                        if not path.stem.startswith("evaluate_"))]
    if case[0] == "evaluate":
        others = set(importlib.import_module("evaluate").COMMANDS) - {case[1]}
        commands = others if case[1] != "all" else set()  # it runs them all
        names += [f"{SHARED}/{path.stem}" for path in (ROOT / SHARED).glob("evaluate_*.py")
                  if path.stem.removeprefix("evaluate_") not in commands]
    read = set().union(*(read_names(ROOT / f"{name}.py") for name in names))
    read |= parse(case).declared.keys()  # arguments of what they are declared for, read by name
    unread = set(vars(parse(case))) - read
    assert not unread


@pytest.mark.parametrize("script", sorted({case[0] for case in MINIMAL}))
def test_every_flag_is_explained(script):
    silent = [f"{parser.prog} {action.option_strings or action.dest}" for parser in
              all_parsers(parser_of(script)) for action in parser._actions
              if not isinstance(action, argparse._SubParsersAction) and not (action.help or "").strip()]
    assert not silent
    for parser in all_parsers(parser_of(script)):
        shown = parser.format_help("all")  # a stray % in a help text raises here
        assert "%(" not in shown
        hidden = [flag for action in parser._actions for flag in action.option_strings
                  if not re.search(rf"^  .*{re.escape(flag)}(?![\w-])", shown, re.MULTILINE)]
        assert not hidden


@pytest.mark.parametrize("script", sorted({case[0] for case in MINIMAL}))
def test_help_begins_with_few_flags_and_names_the_groups_of_the_others(script):
    for parser in all_parsers(parser_of(script)):
        first, usage = parser.format_help(), parser.format_help().split("\n\n")[0]
        assert usage.startswith(f"usage: {parser.prog} ")
        assert "\n" not in usage
        assert all(any(f" {flag} " in usage for flag in action.option_strings) for action in parser._actions
                   if action.required and action.option_strings)
        assert len(re.findall(r"^  -", first, re.MULTILINE)) <= 32
        short = [title.split()[0] for title in re.findall(r"^(\w.*):$", parser.format_help("all"), re.MULTILINE)]
        assert len(short) == len(set(short))
    assert script != "train_distill" or len(first.splitlines()) < 150


@pytest.mark.parametrize("script", sorted({case[0] for case in MINIMAL}))
def test_no_two_flags_share_a_destination(script):
    for parser in all_parsers(parser_of(script)):
        names = [action.dest for action in parser._actions if action.dest != "help"]
        assert len(names) == len(set(names))


ORIGINAL = {  # the original's training line: spelling -> (value given, destination, value expected)
    "--data": ("x", "data", "x"), "--output": ("y", "output", "y"), "-a": ("resnet34", "student_arch", "resnet34"),
    "--student_arch": ("resnet34", "student_arch", "resnet34"), "-k": ("resnet50", "teacher_arch", "resnet50"),
    "--teacher_arch": ("resnet50", "teacher_arch", "resnet50"), "--distill": ("m.pth", "distill", "m.pth"),
    "--loss": ("coss", "loss", "coss"), "--l_0": ("0.3", "l_0", 0.3), "--l_1": ("0.5", "l_1", 0.5),
    "--beta": ("2", "beta", 2.0), "--s-temp": ("0.2", "s_temp", 0.2), "--t-temp": ("0.04", "t_temp", 0.04),
    "--aug": ("swav", "aug", "swav"), "--sampler": ("cf", "sampler", "cf"), "--closek-info": ("n", "closek_info", "n"),
    "--nearest-k": ("7", "nearest_k", 7), "--total-k": ("15", "total_k", 15), "-b": ("32", "batch_size", 32),
    "--batch-size": ("32", "batch_size", 32), "--epochs": ("9", "epochs", 9), "--start-epoch": ("3", "start_epoch", 3),
    "--lr": ("0.1", "lr", 0.1), "--learning-rate": ("0.1", "lr", 0.1), "--momentum": ("0.8", "momentum", 0.8),
    "--wd": ("0", "weight_decay", 0.0), "--weight-decay": ("0.1", "weight_decay", 0.1),
    "--subset": ("0.1", "subset", 0.1),
    "--seed": ("3", "seed", 3), "-j": ("2", "workers", 2), "--workers": ("2", "workers", 2),
    "-p": ("10", "print_freq", 10), "--print-freq": ("10", "print_freq", 10), "--resume": ("c.pth", "resume", "c.pth"),
    "--local_rank": ("1", "local_rank", 1),
}


@pytest.mark.parametrize("flag", ORIGINAL)
def test_the_originals_spellings_mean_the_same(flag):
    value, name, expected = ORIGINAL[flag]
    assert getattr(parse(("train_distill",), flag, value), name) == expected


def test_the_originals_switches():
    case = ("train_distill",)
    assert parse(case, "--distributed").distributed is True
    assert parse(case, "--cos").cos is True
    assert parse(case, "--cos", "false").cos is False
    assert parse(case, "--schedule", "5", "9").schedule == [5, 9]
    assert parse(case, "--resume").resume == "force"


def test_the_originals_spellings_of_compute_knn():
    args = importlib.import_module("compute_knn").parse_args([
        "eval", "--pretrained_weights", "w.pth", "--data_path", "d", "--image_size", "64", "--num_workers", "3",
        "--checkpoint_key", "model"])
    assert (args.weights, args.data, args.image_size, args.workers, args.checkpoint_key) == (
        "w.pth", "d", 64, 3, "model")
    args = importlib.import_module("compute_knn").parse_args([
        "mine", "--pretrained_weights", "w.pth", "--data_path", "d", "--output", "o", "--far", "--k", "12"])
    assert (args.weights, args.far, args.k, args.output) == ("w.pth", True, 12, "o")


def test_defaults_are_the_papers():
    args = parse(("train_distill",))
    optimization, _ = cli.take(Optimization, args).scaled(0.03, 1024, args.batch_size * (1 + args.nearest_k))
    assert (recipe_of("coss").lr, recipe_of("coss").images, optimization.lr) == (0.03, 1024, 0.03)
    paper = {"lr": None, "momentum": 0.9, "weight_decay": 1e-4, "nearest_k": 15, "total_k": 31, "coverage": 0.95,
             "batch_size": 64, "epochs": 25, "cos": True, "loss": "coss", "sampler": "cf", "aug": "moco_v2", "beta": 1,
             "subset": 1, "warmup_epochs": None, "optimizer": "sgd", "decayed": "auto", "clip_grad": 0, "ema": 0,
             "micro_batch": 0, "amp": "auto", "sync_bn": False}
    assert {name: getattr(args, name) for name in paper} == paper
    paper = {"l_0": 1, "l_1": 1, "s_temp": 0.1, "t_temp": 0.07, "space_batch": "local"}
    assert build_loss(args.loss, **methods.options(args)).settings == paper
    args = parse(("train_teacher",))
    assert (recipe_of("moco").lr, recipe_of("moco").images) == (0.03, 256)
    paper = {"lr": None, "momentum": 0.9, "weight_decay": 1e-4, "batch_size": 256, "moco_dim": 128, "queue_size": 65536,
             "moco_m": 0.999, "s_temp": 0.2, "cos": True, "aug": "moco_v2", "warmup_epochs": 0}
    assert {name: getattr(args, name) for name in paper} == paper
    assert parse(("compute_knn", "mine")).k == 384


PLACES = {"data", "output", "resume", "workers", "print_freq", "device", "knn_every", "knn_data", "start_epoch",
          "distributed", "local_rank", "max_pixels", "on_bad_image", "amp", "compile", "tf32", "data_path", "cache",
          "image_cache", "save_every", "keep", "on_nonfinite", "nonfinite_limit", "log_to"}


@pytest.mark.parametrize("script", ["train_distill", "train_teacher"])
def test_only_where_things_lie_and_how_the_work_is_done_may_differ_on_resume(script):
    own = {"closek_info", "fark_info", "cluster_info",  # what they hold is compared with the data
           "micro_batch"}  # what a run that ran out of memory is told to change
    assert parse((script,)).resumable == PLACES | (own if script == "train_distill" else set())


def test_a_resumable_setting_that_shows_in_the_result_belongs_to_an_evaluations_settings():
    from common.evaluation import settings

    found = settings(parse(("evaluate", "linear")))
    assert {"amp", "on_bad_image", "data_path", "dtype", "seed", "subset", "epochs", "cached"} <= set(found)
    assert not {"weights", "data", "output", "json", "device", "workers", "features", "arch", "stem", "image_size",
                "branch", "mean", "checkpoint_key", "feature_batch", "cache", "print_freq"} & set(found)


@pytest.mark.parametrize("case", sorted(MINIMAL.keys() - {("compute_knn", "check"), ("pack_dataset",)}), ids=" ".join)
def test_image_size_exists_wherever_images_are_read(case):
    assert parse(case, "--image-size", "48").image_size == 48


@pytest.mark.parametrize("words", [
    ["--batch-size", "0"], ["--batch-size", "x"], ["--lr", "0"], ["--lr", "nan"], ["--lr", "inf"], ["--lr", "-1"],
    ["--momentum", "1.5"], ["--epochs", "0"], ["--epochs", "2.5"], ["--seed", "-1"], ["--workers", "-1"],
    ["--nearest-k", "-1"], ["--s-temp", "0"], ["--cos", "maybe"], ["--loss", "seed2"], ["--aug", "none"],
    ["--batch", "3"], ["--sampler", "cluster2"], ["--subset", "x"], ["--print-freq", "0"], ["--image-size", "0"],
    ["--l_0", "nan"], ["--l_1", "inf"], ["--beta", "nan"], ["--coverage", "0"], ["--coverage", "1.1"],
    ["--optimizer", "adam"], ["--clip-grad", "-1"], ["--micro-batch", "-1"], ["--ema", "1.5"], ["--space-batch", "all"],
])
def test_values_that_make_no_sense_are_refused_by_the_parser(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(("train_distill",), *words)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert words[0] in err
    assert err.count("\n") == 1
