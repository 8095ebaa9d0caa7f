"""One file of each public layout, as its project saves it: the trunk comes out whole, equal to the network saved."""

import argparse
import contextlib
import functools
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from helpers import sources
from helpers.sources import (
    IMAGENET,
    OPTIMIZER,
    SWAV,
    UNIT,
    _no_initialisation,  # noqa: F401
    features,
    head,
    images,
    imaginary,
    source,
    state,
    under,
)

from checkpoints.frozen import load_frozen
from checkpoints.layouts import LAYOUTS
from checkpoints.reader import read_checkpoint
from models.backbones import build_backbone

ARCH = "resnet_small"
NET, OTHER = state(ARCH), state(ARCH, seed=2)  # the branch that is to be taken, and a sibling that is not
MLP = head("0", "2")
WITH_FC = state(ARCH, head=True)
training = functools.partial(sources.training, arch=ARCH)


@dataclass
class Case:
    """A file's content, and what is to be read from it."""

    layout: str
    content: object
    branch: str = ""
    siblings: list[str] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)
    colours: tuple = IMAGENET
    epoch: int | None = None
    names: tuple[str, ...] = ()  # of classes that exist while the file is written


def moco(fc, q="module.encoder_q.", k="module.encoder_k.", prefix="module.", **more):
    return training({**under(q, {**NET, **under("fc.", fc)}), **under(k, {**OTHER, **under("fc.", fc)}),
                     f"{prefix}queue": torch.zeros(6, 16), f"{prefix}queue_ptr": torch.zeros(1, dtype=torch.long)},
                    **more)


def without_counters(tensors):
    return {k: v for k, v in tensors.items() if "num_batches" not in k}


def with_metadata(tensors):
    ordered = OrderedDict(tensors)
    ordered._metadata = OrderedDict({"": {"version": 1}, "bn1": {"version": 2}})
    return ordered


def downsample_first(tensors):
    """In the order in which simclr-converter's own ResNet registers its layers."""
    return dict(sorted(tensors.items(), key=lambda x: (x[0].split(".")[:2], "downsample" not in x[0])))


def lightning(tensors, **more):
    return {"epoch": 99, "global_step": 1000, "pytorch-lightning_version": "1.9.5", "state_dict": tensors,
            "loops": {}, "callbacks": {}, "optimizer_states": [OPTIMIZER], "lr_schedulers": [], **more}


LIGHTLY_TRAIN, LINEAR = "{}_embedding_model.wrapped_model.{}.", torch.ones(3, 3)


def positional(tensors):
    """nn.Sequential(*list(resnet.children())[:-1])."""
    places = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    return {f"{places[k.partition('.')[0]]}.{k.partition('.')[2]}": v for k, v in tensors.items()}


def solo(backbone="backbone", momentum="momentum_backbone", net=NET):
    return {**under(f"{backbone}.", net), **under(f"{momentum}.", OTHER), **under("classifier.", head("0")),
            **under("projector.", MLP), **under("momentum_projector.", MLP), **under("predictor.", MLP),
            "queue": torch.zeros(2, 6, 16), "queue_ptr": torch.zeros(1)}


def no_classifier(tensors):
    return {name: value for name, value in tensors.items() if not name.startswith("classifier.")}


def vissl(trunk, *more):
    return {"phase_idx": 3, "iteration": 10, "classy_state_dict": {"train_phase_idx": 2, "base_model": {
        "model": {"trunk": trunk, "heads": under("0.clf.", MLP)}}, "optimizer": {"optim": OPTIMIZER}}}


DINO_ARGS = argparse.Namespace(arch=ARCH, lr=0.0005, patch_size=16)
MOCO_DROPS = {"encoder_q.fc.", "encoder_k.", "queue"}
SOLO_DROPS = {"classifier.", "projector.", "momentum_projector.", "predictor.", "queue"}
ALONE = OrderedDict(NET)

CASES = {
    "MoCo v1": lambda: Case("MoCo", moco({"weight": torch.randn(6, 128), "bias": torch.randn(6)}),
                            "encoder_q", ["encoder_k"], MOCO_DROPS, epoch=200),
    "MoCo v2": lambda: Case("MoCo", moco(MLP), "encoder_q", ["encoder_k"], MOCO_DROPS, epoch=200),
    "MoCo v2, released": lambda: Case("MoCo", training(under("module.encoder_q.", {**NET, **under("fc.", MLP)})),
                                      "encoder_q", [], {"encoder_q.fc."}, epoch=200),
    "AdCo": lambda: Case("MoCo", moco(MLP, best_acc=70.1, Memory_Bank={"W": torch.zeros(6, 16)}), "encoder_q",
                         ["encoder_k"], MOCO_DROPS | {"Memory_Bank."}, epoch=200),
    "CLSA": lambda: Case("MoCo", moco(MLP, best_acc=71.0), "encoder_q", ["encoder_k"], MOCO_DROPS, epoch=200),
    "MoCo v3": lambda: Case("MoCo v3", training(
        {**under("module.base_encoder.", {**NET, **under("fc.", head("0", "1b", "3", "4a"))}),
         **under("module.momentum_encoder.", {**OTHER, **under("fc.", head("0", "1b", "3", "4a"))}),
         **under("module.predictor.", head("0", "1b", "3", "4a"))}, scaler={"scale": 65536.0}), "base_encoder",
        ["momentum_encoder"], {"base_encoder.fc.", "momentum_encoder.", "predictor."}, epoch=200),
    "SimSiam": lambda: Case("SimSiam", training({
        **under("module.encoder.", {**NET, **under("fc.", head("0", "1b", "3", "4b", "6", "7a"))}),
        **under("module.predictor.", head("0", "1b", "3"))}), "encoder", [], {"encoder.fc.", "predictor."}, epoch=200),
    "SwAV, released": lambda: Case("SwAV, DeepCluster-v2", OrderedDict(under("module.", {
        **NET, **under("projection_head.", head("0", "1b", "3")), "prototypes.weight": torch.zeros(30, 6)})), "", [],
        {"projection_head.", "prototypes."}, SWAV),
    "SwAV, training": lambda: Case("SwAV, DeepCluster-v2", {
        "epoch": 5, "state_dict": under("module.", {**NET, **under("projection_head.", head("0", "1b", "3")),
                                                    "prototypes.weight": torch.zeros(30, 6)}),
        "optimizer": {**OPTIMIZER, "lr": np.float64(0.6)}, "amp": {"loss_scaler0": {"loss_scale": 65536.0}}},
        "", [], {"projection_head.", "prototypes."}, SWAV, 5),
    "DeepCluster-v2": lambda: Case("SwAV, DeepCluster-v2", OrderedDict(under("module.", {
        **NET, **under("projection_head.", head("0", "1b", "3")), "prototypes.prototypes0.weight": torch.zeros(30, 6),
        "prototypes.prototypes1.weight": torch.zeros(30, 6)})), "", [], {"projection_head.", "prototypes."}, SWAV),
    "DINO, pretrain": lambda: Case("plain", ALONE),
    "DINO, full": lambda: Case("DINO", {
        "student": under("module.backbone.", OTHER) | under("module.head.mlp.", MLP),
        "teacher": under("module.backbone.", NET) | under("module.head.mlp.", MLP),
        "optimizer": OPTIMIZER, "epoch": 7, "args": DINO_ARGS, "dino_loss": {"center": torch.zeros(1, 6)},
        "fp16_scaler": {"scale": np.float64(3)}}, "teacher.backbone", ["student.backbone"],
        {"teacher.head.", "student.backbone.", "student.", "dino_loss."}, epoch=7),
    "Barlow Twins, resnet50.pth": lambda: Case("plain", ALONE),
    "Barlow Twins, checkpoint.pth": lambda: Case("Barlow Twins, VICReg", {"epoch": 12, "model": {
        **under("module.backbone.", NET), **under("module.projector.", head("0", "1b", "3")),
        **under("module.bn.", head("0a"))}, "optimizer": OPTIMIZER}, "backbone", [], {"projector.", "bn."}, epoch=12),
    "VICReg, model.pth": lambda: Case("Barlow Twins, VICReg", lambda exclude: {"epoch": 12, "model": {
        **under("module.backbone.", NET), **under("module.projector.", head("0", "1b", "3"))}, "optimizer": {
            "state": {}, "param_groups": [{"weight_decay_filter": exclude}]}}, "backbone", [], {"projector."}, epoch=12,
        names=("__main__.exclude_bias_and_norm",)),
    "sthalles SimCLR": lambda: Case("SimCLR (PyTorch)", training(under("backbone.", {
        **NET, **under("fc.", MLP)})), "backbone", [], {"backbone.fc."}, UNIT, 200),
    "simclr-converter": lambda: Case("SimCLR (converted)", {"state_dict": downsample_first(WITH_FC)}, "", [], {"fc."},
                                     UNIT),
    "SEED's SimCLR teacher": lambda: Case("plain", {"model": under("module.module.module.", {
        **NET, **under("fc.", head("0", "1b", "3"))})}, "", [], {"fc."}),
    "BYOL, a plain dict": lambda: Case("plain", without_counters(WITH_FC), "", [], {"fc."}),
    "BYOL, with metadata": lambda: Case("plain", with_metadata(without_counters(WITH_FC)), "", [], {"fc."}),
    "solo-learn": lambda: Case("solo-learn", lightning(solo()), "backbone", ["momentum_backbone"],
                               SOLO_DROPS | {"momentum_backbone."}, epoch=99),
    "solo-learn before its renaming": lambda: Case("solo-learn (old)", lightning(solo("encoder", "momentum_encoder")),
                                                   "encoder", ["momentum_encoder"], SOLO_DROPS | {"momentum_encoder."},
                                                   epoch=99),
    "solo-learn before its renaming, without a classifier": lambda: Case(
        "solo-learn (old)", lightning(no_classifier(solo("encoder", "momentum_encoder"))), "encoder",
        ["momentum_encoder"], SOLO_DROPS - {"classifier."} | {"momentum_encoder."}, epoch=99),
    "solo-learn before its renaming, trunk and projector": lambda: Case(
        "solo-learn (old)", lightning({**under("encoder.", NET), **under("projector.", MLP)}), "encoder", [],
        {"projector."}, epoch=99),
    "solo-learn without a classifier": lambda: Case(
        "solo-learn", lightning(no_classifier(solo())), "backbone", ["momentum_backbone"],
        SOLO_DROPS - {"classifier."} | {"momentum_backbone."}, epoch=99),
    "lightly": lambda: Case("lightly", lightning({
        **under("backbone.", NET), **under("projection_head.layers.", head("0", "1b", "3")),
        **under("backbone_momentum.", OTHER), **under("projection_head_momentum.layers.", head("0", "1b", "3")),
        "criterion.memory_bank.bank": torch.zeros(6, 16)}), "backbone", ["backbone_momentum"],
        {"projection_head.", "backbone_momentum.", "projection_head_momentum.", "criterion."}, epoch=99),
    "lightly, positional": lambda: Case("lightly", lightning({
        **under("backbone.", positional(NET)), **under("projection_head.layers.", head("0", "1b", "3"))}), "backbone",
        [], {"projection_head."}, epoch=99),
    "lightly-train": lambda: Case(
        "lightly-train (_features)", lightning({
            **under(LIGHTLY_TRAIN.format("student", "_features"), positional(NET)), "student_projection_head.weight":
            LINEAR, **under(LIGHTLY_TRAIN.format("teacher", "_features"), positional(OTHER))}),
        LIGHTLY_TRAIN.format("student", "_features")[:-1], [LIGHTLY_TRAIN.format("teacher", "_features")[:-1]],
        {LIGHTLY_TRAIN.format("teacher", "_features"), "student_"}, epoch=99),
    "lightly-train, timm's": lambda: Case(
        "lightly-train (_model)", under(LIGHTLY_TRAIN.format("student", "_model"), NET),
        LIGHTLY_TRAIN.format("student", "_model")[:-1]),
    "lightly-train, exported": lambda: Case("model.*", under("model.", WITH_FC), "model", [], {"model.fc."}),
    "lightly, positional and alone": lambda: Case("lightly (positional)", under("backbone.", positional(NET)),
                                                  "backbone"),
    "lightly's benchmarks": lambda: Case("lightly", lightning({
        **under("backbone.", NET), **under("projection_head.layers.", MLP), **under("student_backbone.", OTHER),
        **under("student_projection_head.layers.", MLP), **under("student_prediction_head.layers.", MLP),
        "criterion.center.center": torch.zeros(1, 6), **under("online_classifier.linear.", {"weight": torch.ones(2, 2)})
        }), "backbone", ["student_backbone"], {"projection_head.", "student_backbone.", "student_projection_head.",
                                               "student_prediction_head.", "criterion.", "online_classifier."},
        epoch=99),
    "lightly's DINO": lambda: Case("lightly (student and teacher)", lightning({
        **under("student_backbone.", OTHER), **under("student_head.layers.", MLP), **under("teacher_backbone.", NET),
        **under("teacher_head.layers.", MLP), "criterion.center": torch.zeros(1, 6)}), "teacher_backbone",
        ["student_backbone"], {"teacher_head.", "student_backbone.", "student_head.", "criterion."}, epoch=99),
    "OpenSelfSup's MoCo": lambda: Case("OpenSelfSup", {"meta": {"epoch": 200}, "state_dict": {
        **under("encoder_q.0.", NET), **under("encoder_q.1.mlp.", MLP), **under("encoder_k.0.", OTHER),
        **under("encoder_k.1.mlp.", MLP), **under("backbone.", NET), "queue": torch.zeros(6, 16),
        "queue_ptr": torch.zeros(1)}, "optimizer": OPTIMIZER}, "encoder_q.0", ["encoder_k.0", "backbone"],
        {"encoder_q.1.", "encoder_k.0.", "encoder_k.", "backbone.", "queue"}, epoch=200),
    "mmselfsup 0.x": lambda: Case("mmselfsup", {"meta": {"epoch": 200, "mmcv_version": "1.5"}, "state_dict": {
        **under("backbone.", NET), **under("neck.mlp.", MLP), **under("head.predictor.", MLP)},
        "optimizer": OPTIMIZER}, "backbone", [], {"neck.", "head."}, epoch=200),
    "mmselfsup 1.x": lambda: Case("mmselfsup", lambda history: {
        "meta": {"epoch": 200, "mmengine_version": "0.4"}, "state_dict": {
            **under("backbone.", NET), **under("neck.mlp.", MLP), **under("encoder_k.module.0.", OTHER),
            **under("encoder_k.module.1.mlp.", MLP), "encoder_k.steps": torch.zeros(1), "queue": torch.zeros(6, 16)},
        "message_hub": {"log_scalars": {"train/loss": vars_of(history(), history=np.ones((5, 2)), max_length=9)}}},
        "backbone", ["encoder_k.module.0"], {"neck.", "encoder_k.module.0.", "encoder_k.", "queue"}, epoch=200,
        names=("mmengine.logging.history_buffer.HistoryBuffer",)),
    "VISSL": lambda: Case("VISSL", vissl(under("_feature_blocks.", NET)), "trunk._feature_blocks", [], {"heads."}),
    "VISSL, wrapped": lambda: Case("VISSL (wrapped)", vissl(under("base_model._feature_blocks.", NET)),
                                   "trunk.base_model._feature_blocks", [], {"heads."}),
    "VISSL, converted": lambda: Case("VISSL (converted)", {"model_state_dict": under("_feature_blocks.", NET)},
                                     "_feature_blocks"),
    "VISSL, converted and wrapped": lambda: Case("VISSL (converted, wrapped)", {
        "model_state_dict": under("base_model._feature_blocks.", NET)}, "base_model._feature_blocks"),
    "VISSL, converted and bare": lambda: Case("VISSL (converted)", under("_feature_blocks.", NET), "_feature_blocks"),
    "SEED, training": lambda: Case("SEED", training({
        **under("module.student.", {**NET, **under("fc.", MLP)}), **under("module.teacher.", {
            **state("resnet34"), **under("fc.", MLP)}), "module.queue": torch.zeros(16, 6)}), "student", ["teacher"],
        {"student.fc.", "teacher.", "queue"}, epoch=200),
    "SEED, released": lambda: Case("MoCo", training(under("module.encoder_q.", {**NET, **under("fc.", MLP)})),
                                   "encoder_q", [], {"encoder_q.fc."}, epoch=200),
    "BINGO": lambda: Case("MoCo", {"state_dict": moco(MLP)["state_dict"], "optimizer": OPTIMIZER, "epoch": 3},
                          "encoder_q", ["encoder_k"], MOCO_DROPS, epoch=3),
    "DisCo": lambda: Case("DisCo", training({
        **moco(MLP)["state_dict"], **under("module.teacher_encoder_q.", state("resnet34")),
        **under("module.teacher_encoder_k.", state("resnet34")), "module.teacher_queue": torch.zeros(6, 16)}),
        "encoder_q", ["encoder_k", "teacher_encoder_q", "teacher_encoder_k"],
        MOCO_DROPS | {"teacher_encoder_q.", "teacher_encoder_k.", "teacher_queue"}, epoch=200),
    "SMD": lambda: Case("SMD", training(under("module.encoder.", WITH_FC)), "encoder", [], {"encoder.fc."}, epoch=200),
    "CoSS of the original": lambda: Case("CoSS", training({
        **under("module.backbone.", NET), **under("module.proj_head.", MLP)}), "backbone", [], {"proj_head."},
        epoch=200),
    "linear probe": lambda: Case("plain", training(under("module.", WITH_FC), best_acc1=torch.tensor(70.1)), "",
                                 [], {"fc.", "best_acc1."}, epoch=200),
    "timm, .bin": lambda: Case("plain", WITH_FC, "", [], {"fc."}),
    "timm, training": lambda: Case("plain", training(WITH_FC, state_dict_ema=OTHER, version=2, metric=70.1,
                                                           args=argparse.Namespace(model=ARCH)), "", [],
                                   {"fc.", "state_dict_ema."}, epoch=200),
    "Lightning, self.model": lambda: Case("model.*", lightning(under("model.", WITH_FC)), "model", [], {"model.fc."},
                                          epoch=99),
    "compiled under DDP": lambda: Case("plain", under("module._orig_mod.", WITH_FC), "", [], {"fc."}),
    "DDP under compile": lambda: Case("CoSS", {"state_dict": under("_orig_mod.module.backbone.", NET)}, "backbone"),
    "a trunk compiled alone": lambda: Case("CoSS", {"state_dict": under("module.backbone._orig_mod.", NET)},
                                           "backbone"),
}


def vars_of(made, **attributes):
    made.__dict__.update(attributes)
    return made


def write(case, path):
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(imaginary(name)) for name in case.names]
        torch.save(case.content(*made) if made else case.content, path)
    return path


@pytest.fixture(scope="module")
def trunks():
    return {arch: build_backbone(arch) for arch in (ARCH, "resnet34")}


@pytest.mark.parametrize("name", CASES)
def test_layout(tmp_path, trunks, name):
    case = CASES[name]()
    path = write(case, tmp_path / "file.pth")
    encoder, report = load_frozen(path)  # nothing is said of what is in it
    with torch.no_grad():
        assert torch.equal(encoder.backbone(images()), features(ARCH))
    assert (report.layout, report.arch, report.stem, report.branch) == (case.layout, ARCH, "imagenet", case.branch)
    assert report.branches == case.siblings
    assert set(report.dropped) - {"optimizer.", "optimizer_states."} - {"classy_state_dict."} == case.dropped
    assert (report.mean, report.std) == case.colours == (list(encoder.mean), list(encoder.std))
    assert report.epoch == case.epoch
    assert report.matched == len([k for k in NET if not (name.startswith("BYOL") and "num_batches" in k)])
    assert report.ok
    assert case.layout in {layout.name for layout in LAYOUTS}
    for sibling in case.siblings:  # --branch takes each of them
        checkpoint = read_checkpoint(path, branch=sibling)
        arch = checkpoint.identify().arch
        trunk = trunks[arch]
        other = checkpoint.load_into(trunk)
        assert (other.branch, other.ok) == (sibling, True)
        assert case.branch in other.branches
        with torch.no_grad():
            expected = features(arch, 2 if arch == ARCH and sibling != "backbone" else 1)
            assert torch.equal(trunk.eval()(images()), expected)


def test_the_cases_tell_branches_apart():
    assert not torch.equal(features(ARCH), features(ARCH, seed=2))
    one, two = features(ARCH)
    assert (one - two).abs().mean() > 0.1 * one.abs().mean()  # the images matter
    assert source(ARCH).training is False


OF_TRANSFORMERS = {layout.name for layout in LAYOUTS if layout.name.startswith((  # in test_authors.py
    "CLIP", "transformers", "I-JEPA", "MAE", "RADIO"))}


def test_every_layout_of_the_table_has_a_case():
    covered = {make().layout for make in CASES.values()} | {"detectron2"}  # in test_formats.py
    assert covered == {layout.name for layout in LAYOUTS} - OF_TRANSFORMERS
