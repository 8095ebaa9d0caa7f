"""Command lines of the original CoSS scripts, translated to ours flag by flag.

Most of their flags are ours too, with the same meaning (:data:`SAME`). Flags that the original never reads or that we
do not need are accepted with a warning (:class:`Idle`), some have another name here (:class:`Renamed`), and a flag
whose meaning we cannot keep is refused (:class:`Refused`).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from runtime.errors import UserError


@dataclass(frozen=True)
class Idle:
    """Accepted and ignored, with one value or none (``values`` 0). With ``only``, other values are refused, and
    ``instead`` says what to give, with the refused one for {value}."""

    why: str
    values: int = 1
    only: tuple[str, ...] = ()
    instead: str = ""


@dataclass(frozen=True)
class Renamed:
    """``to``: our name for it."""

    to: str


@dataclass(frozen=True)
class Refused:
    """``why`` ends with what to give instead."""

    why: str


NOWHERE = "the original never reads it"
CRD = Idle(f"{NOWHERE}: it belongs to CRD, a loss that the original does not have")
TORCHRUN = Idle("torchrun's environment says where the processes meet")
PATCH = Idle("the network's name or file says it", only=("16",),
             instead="give --arch timm:vit_small_patch{value}_224, or another network with such patches")
LAUNCH = ("--local_rank",)
SAME = {  # our command -> flags of the original's script that mean there what they mean here
    "train_distill.py": (
        "--data", "--output", "-a", "--student_arch", "-k", "--teacher_arch", "--loss", "-j", "--workers", "--epochs",
        "--start-epoch", "-b", "--batch-size", "--subset", "--closek-info", "--nearest-k", "--total-k", "--sampler",
        "--l_0", "--l_1", "--lr", "--learning-rate", "--schedule", "--momentum", "--wd", "--weight-decay", "-p",
        "--print-freq", "--resume", "--distill", "--aug", "--seed", "--beta", "--s-temp", "--t-temp", "--cos",
        "--distributed", *LAUNCH),
    "mine": ("--pretrained_weights", "--arch", "--output", "--image_size", "--checkpoint_key", "--num_workers",
             "--data_path", "--subset", *LAUNCH),
    "cluster": ("--pretrained_weights", "--arch", "--output", "--image_size", "--checkpoint_key", "--num_workers",
                "--data_path", "--subset", "--num-clusters"),
    "eval": ("--batch_size_per_gpu", "--pretrained_weights", "--arch", "--image_size", "--checkpoint_key",
             "--num_workers", "--data_path", *LAUNCH),
    "linear": ("--data", "-a", "--arch", "-j", "--workers", "--epochs", "-b", "--batch-size", "--lr", "--learning-rate",
               "--schedule", "--momentum", "--wd", "--weight-decay", "-p", "--print-freq", "--seed", "--subset",
               *LAUNCH),
    "retrieval": ("--pretrained_weights", "--arch", "--checkpoint_key", "--num_workers", *LAUNCH),
    "video": ("--pretrained_weights", "--arch", "--checkpoint_key"),
}
OTHERS: dict[str, dict[str, Idle | Renamed | Refused]] = {
    "train_distill.py": {
        "--dataset": Idle(f"{NOWHERE}; --data names the images"),
        "--student_mlp": Idle(f"{NOWHERE}; the student's head is the method's"),
        "-s": Idle(f"{NOWHERE}; what pre-trained the teacher is found from its file"),
        "--teacher_ssl": Idle(f"{NOWHERE}; what pre-trained the teacher is found from its file"),
        "--info": Idle(NOWHERE),
        "--queue": Renamed("--queue-size"),
        "--distill-t": Idle(f"{NOWHERE}; --t-temp is the teacher's temperature"),
        "--temp": Idle(f"{NOWHERE}; --s-temp is the student's temperature"),
        "--dim": Idle(f"{NOWHERE}; features are compared in the teacher's width"),
        **dict.fromkeys(("--feat_dim", "--mode", "--nce_k", "--nce_t", "--nce_m"), CRD),
    },
    "mine": {"--dist_url": TORCHRUN},
    "cluster": {},
    "eval": {
        "--dist_url": TORCHRUN,
        "--output": Renamed("--features"),
        "--dump_features": Idle("features are always kept, in --features or beside the weights", values=0),
        "--split": Idle("the test images are in val/ or test/", only=("val", "test"),
                        instead="give --data a folder in which val/ is a link to {value}/"),
        "--eval_path": Refused("training and test images come from one folder; give --data a folder whose train/ and "
                               "val/ are links to the two"),
    },
    "linear": {
        "--pretrained": Renamed("--weights"),
        "--start-epoch": Idle("the original also starts at epoch 0 when --pretrained is given"),
        "--resume": Refused("evaluate.py linear resumes by itself when the same command is started again; leave it "
                            "out, and give --output DIR for the place"),
        **dict.fromkeys(("-e", "--evaluate"), Refused(
            "give evaluate.py robustness --train ROOT --ood NAME=DIR, which scores a classifier on other images")),
        "--gpu": Idle("each process takes the GPU of its LOCAL_RANK; --device cuda:N gives a single process another"),
    },
    "retrieval": {
        "--data_path": Renamed("--root"),
        "--dataset": Renamed("--datasets"),
        "--imsize": Renamed("--long-side"),
        "--use_cuda": Idle("a GPU is used if there is one", only=("True", "true", "1", "on"),
                           instead="give --device cpu"),
        "--patch_size": PATCH,
        "--dist_url": TORCHRUN,
    },
    "video": {
        "--data_path": Renamed("--data"),
        "--output_dir": Renamed("--masks"),
        "--n_last_frames": Renamed("--context"),
        "--size_mask_neighborhood": Renamed("--radius"),
        "--topk": Renamed("--top-k"),
        "--patch_size": PATCH,
        "--bs": Idle(NOWHERE),
    },
}
ARCHS = {  # names of networks there -> here; the other names that it knows are torchvision's, or ours (mobilenetv3_*)
    "vit_tiny": "vit_ti_16", "vit_small": "vit_s_16", "vit_base": "vit_b_16", "swav_resnet50": "resnet50",
    "simclr_resnet50": "resnet50"}
ARCH_FLAGS = ("-a", "--student_arch", "--student-arch", "-k", "--teacher_arch", "--teacher-arch", "--arch")


def translate(script: str, argv: list[str] | None = None) -> list[str]:
    """``argv`` (default: this process's) for our ``script``, with the original's flags translated to ours.

    The first process prints a sentence on stderr for each flag that does nothing. Raises :class:`UserError` for flags
    that have no equivalent here.
    """
    words, given = list(sys.argv[1:] if argv is None else argv), []
    known = OTHERS.get(script) or OTHERS.get(words[0] if words else "", {})
    while words:
        flag, joined, value = words.pop(0).partition("=")
        rule, is_arch = known.get(flag), flag in ARCH_FLAGS
        if not joined and words and (is_arch or (isinstance(rule, Idle) and rule.values)):
            value = words.pop(0)
        if isinstance(rule, Refused):
            raise UserError(f"{flag} of the original is not supported: {rule.why}")
        if isinstance(rule, Idle):
            if rule.only and value not in rule.only:
                raise UserError(f"{flag} {value} is not supported: {rule.why}; {rule.instead.format(value=value)}")
            if os.environ.get("RANK", "0") == "0":
                print(f"{flag} is not needed and is ignored: {rule.why}", file=sys.stderr)
        elif is_arch:
            given += [flag, ARCHS.get(value, value)] if value or joined else [flag]
        else:
            given.append((rule.to if rule else flag) + joined + value)
    return given
