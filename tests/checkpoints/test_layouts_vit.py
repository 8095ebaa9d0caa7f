"""Plain vision transformers, as DINO, MoCo v3, MAE, MSN, iBOT and timm save them: equal to timm's own network."""

import argparse
import copy

import numpy as np
import pytest
import torch
from helpers.sources import (
    IMAGENET,
    OPTIMIZER,
    _no_initialisation,  # noqa: F401
    head,
    images,
    randomise,
    smallest,  # noqa: F401
    training,
    under,
)

from checkpoints.frozen import load_frozen
from checkpoints.reader import read_checkpoint

PLAIN = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def networks():
    """timm's transformers for images of 32 pixels: (tiny, another tiny, MoCo v3's small one of 12 heads)."""
    timm = pytest.importorskip("timm", reason="timm's own networks are the oracle; pip install timm")

    def make(seed, **options):
        model = timm.create_model(PLAIN, img_size=32, num_classes=0, **options)
        return randomise(model, seed)
    return make(1), make(2), make(3, embed_dim=384, num_heads=12)


def close(ours, expected):
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_equal_to(encoder, model):
    with torch.no_grad():
        close(encoder.backbone(images(32)), model(images(32)))


def save(content, folder):
    torch.save(content, folder / "file.pth")
    return folder / "file.pth"


def test_dino_pretrain(tmp_path, networks):
    encoder, report = load_frozen(save(networks[0].state_dict(), tmp_path))
    assert_equal_to(encoder, networks[0])
    assert (report.layout, report.arch, report.image_size) == ("plain", "vit_ti_16", 32)
    assert (report.matched, report.dropped) == (len(networks[0].state_dict()), {})
    assert (report.mean, report.std) == IMAGENET


def test_dino_full(tmp_path, networks):
    path = save({"student": under("module.backbone.", networks[1].state_dict()) | under("module.head.mlp.", head("0")),
                 "teacher": under("backbone.", networks[0].state_dict()) | under("head.mlp.", head("0")),
                 "optimizer": OPTIMIZER, "epoch": 100, "dino_loss": {"center": torch.zeros(1, 6)},
                 "args": argparse.Namespace(arch="vit_tiny", lr=np.float64(1), patch_size=16)}, tmp_path)
    encoder, report = load_frozen(path)
    assert_equal_to(encoder, networks[0])
    assert (report.layout, report.branch, report.branches, report.epoch) == (
        "DINO", "teacher.backbone", ["student.backbone"], 100)
    assert report.dropped == {"teacher.head.": 2, "student.backbone.": len(networks[1].state_dict()), "student.": 2,
                              "dino_loss.": 1, "optimizer.": 1}
    encoder, report = load_frozen(path, branch="student.backbone")
    assert_equal_to(encoder, networks[1])


@pytest.mark.parametrize("recorded", [True, False])
def test_moco_v3(tmp_path, networks, recorded):
    base, momentum = networks[2].state_dict(), {k: 2 * v for k, v in networks[2].state_dict().items()}
    content = training({
        **under("module.base_encoder.", {**base, **under("head.", head("0", "1b", "3", "4b", "6", "7a"))}),
        **under("module.momentum_encoder.", momentum), **under("module.predictor.", head("0", "1b", "3", "4a"))},
        "vit_small", scaler={"scale": 1.0})
    if not recorded:
        del content["arch"]
    encoder, report = load_frozen(save(content, tmp_path))
    assert_equal_to(encoder, networks[2])
    assert (report.layout, report.arch, report.branch) == ("MoCo v3", "vit_s_16_12h", "base_encoder")
    assert report.branches == ["momentum_encoder"]
    assert set(report.dropped) == {"base_encoder.head.", "momentum_encoder.", "predictor.", "optimizer."}
    assert any("another number of heads" in note for note in report.notes)
    checkpoint = read_checkpoint(tmp_path / "file.pth", branch="momentum_encoder")
    assert torch.equal(checkpoint.match(encoder.backbone)[1]["class_token"], momentum["cls_token"])


def test_moco_v3_linear_probe(tmp_path, networks):
    """Its file records vit_small, whose 12 heads no shape shows."""
    tensors = {**networks[2].state_dict(), **under("head.", {"weight": torch.ones(5, 384), "bias": torch.ones(5)})}
    encoder, report = load_frozen(save(training(under("module.", tensors), "vit_small"), tmp_path))
    assert_equal_to(encoder, networks[2])
    assert (report.arch, report.dropped) == ("vit_s_16_12h", {"head.": 2, "optimizer.": 1})


def test_timm_training_file(tmp_path, networks):
    content = training({**networks[0].state_dict(), "head.weight": torch.ones(5, 192), "head.bias": torch.ones(5)},
                       PLAIN, state_dict_ema=networks[1].state_dict(), args=argparse.Namespace(model=PLAIN), version=2)
    encoder, report = load_frozen(save(content, tmp_path))
    assert_equal_to(encoder, networks[0])
    assert (report.arch, report.recorded_arch) == ("vit_ti_16", PLAIN)
    assert report.dropped == {"head.": 2, "optimizer.": 1, "state_dict_ema.": len(networks[1].state_dict())}


def test_as_timms_own_network(tmp_path, networks):
    path = save({**networks[0].state_dict(), "head.weight": torch.ones(5, 192), "head.bias": torch.ones(5)}, tmp_path)
    encoder, report = load_frozen(path, f"timm:{PLAIN}", image_size=32)
    with torch.no_grad():
        assert torch.equal(encoder.backbone(images(32)), networks[0](images(32)))
    assert report.dropped == {"head.": 2}
    assert (report.mean, report.std) == ([0.5] * 3, [0.5] * 3)  # timm's own, for this name


def test_wrapped(tmp_path, networks):
    encoder, report = load_frozen(save({"state_dict": under("_orig_mod.module.", networks[0].state_dict())}, tmp_path))
    assert_equal_to(encoder, networks[0])


def mae(tensors, others):
    """facebookresearch/mae, with the decoder; the released encoders alone are the first of these lines."""
    decoder = ("decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "decoder_norm.weight",
               "decoder_pred.weight", "mask_token")
    return {"model": {**tensors, **{name: torch.ones(1, 6) for name in decoder}}, "epoch": 800}


def msn(tensors, others):
    """facebookresearch/msn."""
    fc = under("module.fc.", {"fc1.weight": torch.ones(6, 64), "bn1.running_var": torch.ones(6)})
    return {"encoder": {**under("module.", others), **fc}, "target_encoder": {**under("module.", tensors), **fc},
            "prototypes": torch.ones(4, 6), "opt": OPTIMIZER, "epoch": 800, "temperature": 0.1}


def ibot(tensors, others):
    """bytedance/ibot's training file."""
    heads = {"last_layer.weight_g": torch.ones(6, 1), "mlp.0.bias": torch.ones(6)}
    return {"student": {**under("module.backbone.", {**others, "masked_embed": torch.ones(1, 64)}),
                        **under("module.head.", heads)},
            "teacher": {**under("backbone.", tensors), **under("head.", heads)}, "epoch": 800,
            "ibot_loss": {"center": torch.zeros(1, 6), "center2": torch.zeros(1, 1, 6)}, "optimizer": OPTIMIZER}


@pytest.mark.parametrize(("names", "layout", "feature"), [
    (mae, "MAE", "mean"), (msn, "I-JEPA, MSN", "auto"), (ibot, "DINO", "auto"), (
        lambda tensors, _: {"state_dict": tensors}, "plain", "auto")], ids=["MAE", "MSN", "iBOT", "its teacher"])
def test_authors_at_two_sizes(names, layout, feature, tmp_path, smallest):  # noqa: F811
    timm = pytest.importorskip("timm", reason="timm's own networks are the oracle; pip install timm")
    model, other = (randomise(timm.create_model(PLAIN, img_size=32, num_classes=0, embed_dim=64, depth=2, num_heads=2),
                              seed) for seed in (1, 2))
    path = save(names(copy.deepcopy(model.state_dict()), other.state_dict()), tmp_path)
    for size in (32, 48):
        encoder, report = load_frozen(path, image_size=size, feature=feature)
        assert (report.layout, report.arch, report.image_size) == (layout, smallest, size)
        model.set_input_size(img_size=size)  # timm's own resampling
        with torch.no_grad():
            tokens = model.forward_features(images(size))
            close(encoder.backbone(images(size)), tokens[:, 1:].mean(1) if feature == "mean" else tokens[:, 0])
    others = [name for name in report.branches if names in (msn, ibot)]
    for branch in others:
        with torch.no_grad():
            close(load_frozen(path, branch=branch)[0].backbone(images(32)), other(images(32)))
    assert len(others) == (names in (msn, ibot))
