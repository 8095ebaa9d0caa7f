"""Files with no trunk that can be read: one sentence each, which names the file and says what to do."""

import gzip
import pickle

import numpy as np
import pytest
import torch
from helpers.sources import (
    OPTIMIZER,
    _no_initialisation,  # noqa: F401
    head,
    imaginary,
    state,
    training,
    under,
)
from torch import nn

from checkpoints.frozen import load_frozen
from runtime.errors import UserError

LINEAR = {"weight": torch.zeros(5, 512), "bias": torch.zeros(5)}
ADVICE = ("; give ", "; take ", "; download ", "; convert ", "; save ", ", so save ", ", so leave ", ", so give ",
          "; it holds ", "--arch ", "which torchvision")


def refusal(path, arch=None, **options):
    """What a refused file is told."""
    with pytest.raises(UserError) as caught:
        load_frozen(path, arch, flag="--distill", prefix="--teacher-", **options)
    text = str(caught.value)
    assert text.isprintable()  # one line
    assert str(path) in text
    assert caught.value.exit_code == 2
    assert any(words in text for words in ADVICE)
    return text.replace(str(path), path.name)


def saved(content, folder):
    torch.save(content, folder / "file.pth")
    return folder / "file.pth"


NO_BACKBONE = {
    "SwAV's eval_linear": {"epoch": 100, "state_dict": under("module.linear.", LINEAR), "optimizer": OPTIMIZER,
                           "scheduler": {}, "best_acc": 75.3},
    "DINO's linearweights": {"epoch": 100, "state_dict": under("module.linear.", LINEAR), "best_acc": 75.3,
                             "optimizer": OPTIMIZER, "scheduler": {}},
    "BINGO's linear classifier": {"net": under("module.", LINEAR)},
    "SwAV's queue": {"queue": torch.zeros(2, 16, 6)},
    "DeepCluster-v2's mb0": {"local_memory_index": torch.zeros(16, dtype=torch.long),
                             "local_memory_embeddings": torch.zeros(2, 16, 6)},
}


@pytest.mark.parametrize("name", NO_BACKBONE)
def test_no_backbone_inside(tmp_path, name):
    text = refusal(saved(NO_BACKBONE[name], tmp_path))
    assert "holds no image backbone" in text
    assert text.endswith("give the file of the pretrained network itself")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.visual(x)


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("trust", [False, True])
def test_torchscript(tmp_path, how, trust):
    made = torch.jit.script(Tiny()) if how == "script" else torch.jit.trace(Tiny(), torch.zeros(1, 3, 8, 8))
    made.save(tmp_path / "RN50.pt")
    assert "is a TorchScript archive (as CLIP's files are)" in refusal(tmp_path / "RN50.pt", trust_checkpoint=trust)


@pytest.mark.parametrize("kind", ["plain", "gzip", "torch"])
def test_jax_objects(tmp_path, kind):
    path = tmp_path / "pretrain_res50x1.pkl"
    with imaginary("jax.interpreters.xla.DeviceArray") as array, imaginary("haiku.data_structures.FlatMapping") as flat:
        content = {"experiment_state": {"online_params": [flat(), array()]}}
        if kind == "torch":
            torch.save(content, path)
        else:
            path.write_bytes((gzip.compress if kind == "gzip" else bytes)(pickle.dumps(content)))
    text = refusal(path)
    if kind == "gzip":
        assert "is not a PyTorch checkpoint" in text
    else:
        assert "was saved by JAX (haiku.data_structures.FlatMapping, jax.interpreters.xla.DeviceArray)" in text


def test_haiku_names_of_numpy_arrays(tmp_path):
    params = {"res_net50/~/initial_conv": {"w": np.zeros((7, 7, 3, 64), np.float32)},
              "res_net50/~/initial_batchnorm": {"scale": np.zeros(64, np.float32)}}
    (tmp_path / "byol.pkl").write_bytes(pickle.dumps(params))
    assert "a network of JAX's" in refusal(tmp_path / "byol.pkl")
    (tmp_path / "byol.pkl").write_bytes(pickle.dumps({"experiment_state": {"online_params": params}}))
    assert "a network of JAX's" in refusal(tmp_path / "byol.pkl")


# ---- other networks

def dinov2(block="blocks.0."):
    return {"cls_token": torch.zeros(1, 1, 384), "pos_embed": torch.zeros(1, 1370, 384),
            "mask_token": torch.zeros(1, 384),
            "patch_embed.proj.weight": torch.zeros(384, 3, 14, 14), "patch_embed.proj.bias": torch.zeros(384),
            f"{block}norm1.weight": torch.zeros(384), f"{block}ls1.gamma": torch.zeros(384),
            f"{block}attn.qkv.weight": torch.zeros(1152, 384), "norm.weight": torch.zeros(384)}


def widened(tensors, times=2):
    """Every channel count times two, as SimCLR's and SwAV's 2x networks; each tensor is one zero, seen often."""
    return {k: v.new_zeros(()).expand([n * times if not (k == "conv1.weight" and i == 1) and i < 2 else n
                                       for i, n in enumerate(v.shape)]) for k, v in tensors.items()}


def conv(outside, inside, size=3):
    return torch.zeros(outside, inside, size, size)


def three_convolutions(names):
    first, *others = names
    trunk = {k: v for k, v in state("resnet50").items() if not k.startswith(("conv1.", "bn1."))}
    return {first: conv(32, 3), **dict(zip(others, (conv(32, 32), conv(64, 32)), strict=True)),
            "bn1.weight": torch.zeros(64), **trunk}


CLIP = three_convolutions(["conv1.weight", "conv2.weight", "conv3.weight"])
RESNET_D = three_convolutions(["conv1.0.weight", "conv1.3.weight", "conv1.6.weight"])
VIT_CONV = {"cls_token": torch.zeros(1, 1, 384), "pos_embed": torch.zeros(1, 197, 384),
            "patch_embed.proj.0.weight": conv(48, 3), "blocks.0.attn.qkv.weight": torch.zeros(1152, 384)}

NEAREST = "nearest is timm:vit_small_patch14_dinov2.lvd142m, with 166 missing (blocks.0.norm1.bias"

OTHERS = {
    "DINOv2": (dinov2, NEAREST),
    "DINOv2, in chunks": (lambda: dinov2("blocks.0.0."), NEAREST),
    "DINOv2, teacher": (lambda: {"teacher": under("backbone.", dinov2()) | under("dino_head.", head("0"))},
                        NEAREST),
    "DINOv2, training": (lambda: {"iteration": 3, "model": under("student.backbone.", dinov2()) | under(
        "teacher.backbone.", dinov2())}, NEAREST),
    "2x wide": (lambda: widened(state("resnet50")), "widened 2 times (its first convolution has 128 channels)"),
    "2x wide, SwAV": (lambda: under("module.", {**widened(state("resnet50")), "prototypes.weight": torch.zeros(3, 8),
                                                **under("projection_head.", head("0", "1b", "3"))}), "widened 2 times"),
    "4x wide, SimCLR": (lambda: {"state_dict": widened(state("resnet50", head=True), 4)}, "widened 4 times"),
    "CLIP's ResNet": (lambda: {**CLIP, "attnpool.positional_embedding": torch.zeros(50, 8)},
                      "a ResNet with a stem of three convolutions (CLIP's)"),
    "CLIP, whole": (lambda: {**under("visual.", CLIP), "visual.attnpool.k_proj.weight": torch.zeros(8, 8),
                             "transformer.resblocks.0.ln_1.weight": torch.zeros(8), "logit_scale": torch.zeros(())},
                    "a ResNet with a stem of three convolutions (CLIP's)"),
    "CLIP's ViT": (lambda: {"visual.class_embedding": torch.zeros(8), "visual.conv1.weight": conv(8, 3, 16),
                            "visual.transformer.resblocks.0.ln_1.weight": torch.zeros(8)}, "the image half of CLIP"),
    "ResNet-D": (lambda: RESNET_D, "three convolutions (ResNet-C and -D)"),
    "vit_conv": (lambda: training(under("module.base_encoder.", VIT_CONV), "vit_conv_small"), "vit_conv"),
    "SEED's EfficientNet": (lambda: training(under("module.student.", {
        "_conv_stem.weight": conv(32, 3), "_blocks.0._depthwise_conv.weight": conv(32, 1), "_fc.0.weight": LINEAR[
            "weight"]}), "efficientnet_b0"), "nearest is timm:tf_efficientnet_lite0, with"),
    "timm's EfficientNet": (lambda: {"conv_stem.weight": conv(32, 3), "blocks.0.0.conv_dw.weight": conv(32, 1),
                                     "classifier.weight": LINEAR["weight"]}, "--arch timm:NAME"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_network(tmp_path, name):
    make, says = OTHERS[name]
    text = refusal(saved(make(), tmp_path))
    assert says in text
    assert "fits no architecture known here" in text


def test_a_widened_resnet_is_not_wide_resnet50_2(tmp_path):
    wide, times_two = state("wide_resnet50_2"), widened(state("resnet50"))
    assert wide["layer1.0.conv1.weight"].shape == times_two["layer1.0.conv1.weight"].shape[:1] + (64, 1, 1)
    text = refusal(saved(times_two, tmp_path), "wide_resnet50_2")
    assert "does not fit wide_resnet50_2" in text
    assert "widened 2 times" in text
    assert load_frozen(saved(wide, tmp_path))[1].arch == "wide_resnet50_2"


@pytest.mark.parametrize(("holds", "asked"), [("resnet101", "resnet50"), ("resnet34", "resnet18")])
def test_a_deeper_network_is_not_taken_for_a_shallower(tmp_path, holds, asked):
    deeper = state(holds)
    assert set(state(asked)) < set(deeper)  # it would fill it
    for content in (deeper, training(under("module.encoder_q.", deeper), holds)):
        text = refusal(saved(content, tmp_path), asked)
        assert "unexpected" in text
        assert f"it fits {holds} with stem 'imagenet', so give that" in text
    assert "missing" not in text


def test_what_was_given_or_fits_already_is_not_advised(tmp_path):
    content = {**under("encoder.", state()), "encoder_of_text.weight": torch.ones(2, 2)}
    for asked in ("resnet18", None):
        text = refusal(saved(content, tmp_path), asked)
        assert "1 unexpected (encoder_of_text.weight); its trunk fits, so save only that" in text
        assert "so give that" not in text


def test_a_lying_name_is_not_believed(tmp_path):
    """The shapes decide; SEED's, DisCo's and SMD's files name the student anyway."""
    report = load_frozen(saved(training(state(), "resnet50"), tmp_path))[1]
    assert (report.arch, report.recorded_arch) == ("resnet18", "resnet50")
    assert "it records resnet50, but resnet18 was taken" in report.notes
    assert "the file says it holds resnet50" in refusal(tmp_path / "file.pth", "resnet34")


def test_prefixes_are_anchored(tmp_path):
    """encoder_q. is not encoder., and a head's name inside a trunk's key drops nothing."""
    path = saved({"state_dict": {**under("my.backbone.", state()), "my.other.weight": torch.ones(3)}}, tmp_path)
    text = refusal(path)
    assert text.endswith("fits no architecture known here: a whole network lies under my.backbone (resnet18); give "
                         "--teacher-branch my.backbone")
    report = load_frozen(path, branch="my.backbone")[1]
    assert (report.arch, report.branch, report.dropped) == ("resnet18", "my.backbone", {"my": 1})
    tensors = {**state("efficientnet_b0"), "classifier.1.weight": torch.zeros(5, 1280)}
    assert any(".fc1." in k for k in tensors)
    assert load_frozen(saved(tensors, tmp_path))[1].dropped == {"classifier.": 1}


def test_no_such_branch(tmp_path):
    path = saved({**under("encoder_q.", state()), **under("encoder_k.", state(seed=2))}, tmp_path)
    text = refusal(path, branch="encoder_x")
    assert text == "--teacher-branch encoder_x is not in file.pth; it holds encoder_q, encoder_k"
    text = refusal(saved(state(), tmp_path), branch="encoder_q")
    assert text.endswith("it holds one trunk without a prefix, so omit the flag")


def test_names_in_a_file_cannot_break_the_line(tmp_path):
    refusal(saved({**state(), "evil\nname\x1b[31m": torch.zeros(1)}, tmp_path))
    refusal(saved({"a\nb": torch.zeros(3)}, tmp_path))
    refusal(saved({"state_dict": {}, "c\nd": 3}, tmp_path))


def test_a_dictionary_that_holds_itself(tmp_path):
    loop = {"epoch": 3}
    loop["state_dict"] = {"again": loop}
    assert "no tensors" in refusal(saved(loop, tmp_path))
