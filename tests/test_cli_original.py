"""Every flag of the original's scripts on our command lines, and what becomes of it."""

import pytest

import compute_knn
import evaluate
import train_distill
from common.cli_original import ARCHS, OTHERS, SAME, Idle, Refused, Renamed, translate
from runtime.errors import UserError

# What argparse of the original's scripts lists, in their order, each with a value that it takes.
TRAIN = {  # train_sampled_coss.py
    "--data": "d", "--output": "o", "--dataset": "FAKE", "-a": "resnet18", "--student_arch": "resnet18",
    "-k": "resnet50", "--teacher_arch": "resnet50", "--student_mlp": "True", "-s": "moco", "--teacher_ssl": "moco",
    "--loss": "coss", "-j": "4", "--workers": "4", "--epochs": "200", "--start-epoch": "0", "-b": "256",
    "--batch-size": "256", "--subset": "1", "--closek-info": "c.npy", "--nearest-k": "7", "--total-k": "32",
    "--sampler": "cf", "--l_0": "1", "--l_1": "0.5", "--lr": "0.03", "--learning-rate": "0.03", "--schedule": "120",
    "--momentum": "0.9", "--wd": "1e-4", "--weight-decay": "1e-4", "-p": "500", "--print-freq": "500",
    "--resume": "x.pth", "--distill": "t.pth", "--aug": "moco_v1", "--seed": "1", "--info": "i", "--queue": "65536",
    "--beta": "1.0", "--s-temp": "0.1", "--t-temp": "0.07", "--distill-t": "1e-4", "--dim": "128", "--temp": "0.2",
    "--cos": "True", "--local_rank": "0", "--distributed": None, "--feat_dim": "128", "--mode": "exact",
    "--nce_k": "16384", "--nce_t": "0.07", "--nce_m": "0.5"}
NETWORK = {"--pretrained_weights": "t.pth", "--arch": "resnet50", "--output": "o", "--image_size": "224",
           "--checkpoint_key": "state_dict", "--num_workers": "10", "--data_path": "d"}
MINE = {**NETWORK, "--dist_url": "env://", "--local_rank": "0", "--subset": "1"}  # compute_close_far.py
CLUSTER = {**NETWORK, "--subset": "1", "--num-clusters": "10"}  # cluster.py
EVAL = {**NETWORK, "--batch_size_per_gpu": "256", "--dump_features": None, "--dist_url": "env://", "--local_rank": "0",
        "--split": "val", "--eval_path": "e"}  # eval_knn.py
LINEAR = {  # lincls.py
    "--data": "d", "-a": "resnet18", "--arch": "resnet18", "-j": "4", "--workers": "4", "--epochs": "100",
    "--start-epoch": "0", "-b": "256", "--batch-size": "256", "--lr": "30", "--learning-rate": "30", "--schedule": "60",
    "--momentum": "0.9", "--wd": "0", "--weight-decay": "0", "-p": "1000", "--print-freq": "1000", "--resume": "x.pth",
    "-e": None, "--evaluate": None, "--seed": "1", "--gpu": "0", "--pretrained": "x.pth", "--local_rank": "0",
    "--subset": "0.1"}
DINO = {"--pretrained_weights": "x.pth", "--arch": "vit_small", "--patch_size": "16", "--checkpoint_key": "teacher",
        "--data_path": "d"}
RETRIEVAL = {**DINO, "--dataset": "rparis6k", "--imsize": "224", "--use_cuda": "True", "--num_workers": "10",
             "--dist_url": "env://", "--local_rank": "0"}  # eval_image_retrieval.py
VIDEO = {**DINO, "--output_dir": "o", "--n_last_frames": "4", "--size_mask_neighborhood": "9", "--topk": "7",
         "--bs": "6"}  # eval_video_segmentation.py
SCRIPTS = {"train_distill.py": TRAIN, "mine": MINE, "cluster": CLUSTER, "eval": EVAL, "linear": LINEAR,
           "retrieval": RETRIEVAL, "video": VIDEO}
NEEDED = {"train_distill.py": ["--data", "d", "--output", "o"],
          "mine": ["mine", "--data_path", "d", "--pretrained_weights", "w", "--output", "o"],
          "cluster": ["cluster", "--data_path", "d", "--pretrained_weights", "w", "--output", "o", "--num-clusters=9"],
          "eval": ["eval", "--data_path", "d", "--pretrained_weights", "w"],
          "linear": ["linear", "--data", "d", "--weights", "w"], "retrieval": ["retrieval", "--weights", "w"],
          "video": ["video", "--data", "d", "--weights", "w"]}
OURS = dict.fromkeys(("linear", "retrieval", "video"), evaluate) | {"train_distill.py": train_distill}
ALL = [(script, flag) for script, flags in SCRIPTS.items() for flag in flags]


def parse(script, *more):
    return OURS.get(script, compute_knn).parse_args([*NEEDED[script], *more])


@pytest.mark.parametrize(("script", "flag"), ALL)
def test_every_flag_of_the_original(script, flag, capsys):
    value = SCRIPTS[script][flag]
    words, rule = [flag] + [value] * (value is not None), OTHERS[script].get(flag)
    assert (flag in SAME[script]) != (rule is not None)
    if isinstance(rule, Refused):
        with pytest.raises(UserError, match=f"{flag} .*give "):
            parse(script, *words)
        return
    args = parse(script, *words)
    said = capsys.readouterr().err
    if isinstance(rule, Idle):
        assert vars(args) == vars(parse(script))
        assert said.startswith(f"{flag} is not needed and is ignored: ")
        assert said.count("\n") == 1
    else:
        assert said == ""
        if isinstance(rule, Renamed):
            assert vars(args) == vars(parse(script, rule.to, value))
        elif value is not None:
            assert parse(script, f"{flag}={value}" if flag.startswith("--") else flag + value) == args


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_table_holds_no_other(script):
    assert set(SAME[script]) | set(OTHERS[script]) == set(SCRIPTS[script])


@pytest.mark.parametrize(("theirs", "ours"), ARCHS.items())
def test_names_of_networks(theirs, ours):
    assert parse("train_distill.py", "-a", theirs, "-k", theirs).student_arch == ours
    assert parse("train_distill.py", f"--teacher_arch={theirs}").teacher_arch == ours
    assert parse("mine", "--arch", theirs).arch == ours


def test_the_originals_line():
    """Of its scripts/cf_train.sh."""
    line = ("--distributed --output out --l_0 1 --l_1 1 -a mobilenetv3_large -k resnet50 -b 64 --distill moco.pth "
            "--s-temp 0.1 --t-temp 0.07 --aug moco_v2 --loss coss --data imagenet/train --closek-info closek_info.npy "
            "-p 1000 --sampler cf --nearest-k 15 --total-k 31 --epochs 25 --local_rank 0 -s moco --queue=512")
    args = train_distill.parse_args(line.split())
    args.checks = {}  # its files are not here
    train_distill.check_flags(args)
    assert (args.student_arch, args.queue_size, args.data) == ("mobilenetv3_large", 512, "imagenet/train")


@pytest.mark.parametrize(("words", "said"), [
    (["eval", "--split", "test-a"], "--split test-a .*link to test-a/"),
    (["eval", "--split=test-a"], "--split test-a .*link to test-a/"),
    (["retrieval", "--use_cuda", "false"], "--use_cuda false .*give --device cpu"),
    (["video", "--patch_size", "8"], "--patch_size 8 .*give --arch timm:vit_small_patch8_224")])
def test_another_value(words, said):
    with pytest.raises(UserError, match=said):
        translate("compute_knn.py", words)


def test_dinos_lines():
    """Of eval_image_retrieval.py and eval_video_segmentation.py."""
    line = ("retrieval --data_path sets --dataset rparis6k --imsize 512 --arch vit_small --pretrained_weights x.pth "
            "--checkpoint_key teacher")
    args = evaluate.parse_args(line.split())
    assert (args.root, args.datasets, args.long_side, args.arch) == ("sets", ["rparis6k"], 512, "vit_s_16")
    line = ("video --data_path davis --output_dir masks --topk 7 --n_last_frames 4 --size_mask_neighborhood=9 "
            "--pretrained_weights x.pth")
    args = evaluate.parse_args(line.split())
    assert (args.data, args.masks, args.top_k, args.context, args.radius) == ("davis", "masks", 7, 4, 9)


def test_a_flag_at_the_end_is_argparses():
    assert translate("train_distill.py", ["-a"]) == ["-a"]
    assert translate("compute_knn.py", []) == []


def test_a_value_is_not_taken_for_a_flag_of_another_command():
    assert translate("compute_knn.py", ["mine", "--split", "val"]) == ["mine", "--split", "val"]
    assert translate("evaluate.py", ["all", "--skip", "linear", "--gpu", "1"]) == ["all", "--skip", "linear", "--gpu",
                                                                                  "1"]
