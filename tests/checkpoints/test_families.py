"""Teachers of other libraries in their authors' layouts: found from names and shapes, and equal to the library's own.

Found at their released sizes, on tensors without memory; compared at two blocks of 64 channels.
"""

import functools
import re
from pathlib import Path

import pytest
import torch
from helpers.sources import (
    _no_initialisation,  # noqa: F401
    images,
    randomise,
    smallest,  # noqa: F401
)

from checkpoints.authors import to_authors
from checkpoints.frozen import load_frozen
from checkpoints.layouts import find_layout
from checkpoints.match import Checkpoint
from checkpoints.reader import read_checkpoint
from checkpoints.timm_names import timm_candidates
from checkpoints.translation import translate
from models.backbones import TIMM, Spec

load_file = pytest.importorskip("safetensors.torch", reason="transformers' files; pip install safetensors").load_file
timm = pytest.importorskip("timm", reason="these networks are timm's; pip install timm")
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
MLP = {"intermediate_size": 256}
OURS = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 56}
GATED = {"use_swiglu_ffn": True}
DINOV3 = {**SMALL, **MLP, "num_register_tokens": 4}
TOKEN = {**OURS, "patch_size": 14, "global_pool": "token"}


def sides(width, depth, positions=0, patch=14, **more):
    """What the dimensions of the shrunk network are in the released one."""
    return {64: width, 192: 3 * width, 256: 4 * width, 17: 1 + positions, 16: positions, 14: patch, "depth": depth,
            **more}


# transformers' class, its shrunk arguments, the released dimensions, timm's name, and its arguments that shrink it so
TRANSFORMERS = {
    "DINOv2": ("Dinov2", SMALL, sides(384, 12, 37 ** 2), "vit_small_patch14_dinov2.lvd142m", OURS),
    "DINOv2, giant": ("Dinov2", {**SMALL, **GATED}, {**sides(1536, 40, 37 ** 2), 352: 8192, 176: 4096},
                      "vit_giant_patch14_dinov2.lvd142m", {**OURS, "mlp_ratio": 352 / 64}),
    "DINOv2, registers": ("Dinov2WithRegisters", SMALL, sides(768, 12, 37 ** 2),
                          "vit_base_patch14_reg4_dinov2.lvd142m", OURS),
    "DINOv3": ("DINOv3ViT", DINOV3, sides(384, 12, patch=16), "vit_small_patch16_dinov3_qkvb.lvd1689m", TOKEN),
    "DINOv3, S+": ("DINOv3ViT", {**DINOV3, "use_gated_mlp": True, "hidden_act": "silu"},
                   sides(384, 12, patch=16), "vit_small_plus_patch16_dinov3_qkvb.lvd1689m", TOKEN),
    "DINOv3, ConvNeXt": ("DINOv3ConvNext", {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1]}, None,
                         "convnext_tiny.dinov3_lvd1689m", {"dims": (8, 16, 32, 64), "depths": (1, 1, 2, 1)}),
    "I-JEPA": ("IJepa", {**SMALL, **MLP}, sides(1280, 32, 16 ** 2), "vit_huge_patch14_gap_224.in1k_ijepa", OURS),
    "CLIP": ("CLIPVision", {**SMALL, **MLP}, sides(768, 12, 7 ** 2, 32), "vit_base_patch32_clip_quickgelu_224.openai",
             {**OURS, "patch_size": 14}),
    "SigLIP": ("SiglipVision", {**SMALL, **MLP}, sides(768, 12, 14 ** 2, 16), "vit_base_patch16_siglip_224.webli",
               {**OURS, "patch_size": 14, "act_layer": "gelu_tanh"}),  # transformers', which timm leaves to its SO400M
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the oracle; pip install transformers")


def checkpoint_of(tensors, **meta):
    """What read_checkpoint finds in a file of these tensors, that lie in memory or nowhere."""
    layout = find_layout(tensors)
    return Checkpoint(Path("file"), "--distill", layout, "", layout.prefix, tensors, {}, meta)


def saved(transformers, name, options, folder):
    """A model of transformers', and its tensors under the names of its files."""
    model = randomise(getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options)))
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def released(tensors, dimensions):
    """Tensors without memory under the same names, as large and as many as in the file that was released."""
    made = {}
    for name, value in tensors.items():
        shape = [dimensions.get(side, side) for side in value.shape]
        for number in range(dimensions["depth"]) if re.search(r"layers?\.0\.", name) else [0]:
            make = torch.ones if name.endswith("bias") else functools.partial(torch.empty, device="meta")
            made[re.sub(r"(layers?)\.0\.", rf"\1.{number}.", name)] = make(shape)
    return {name: value for name, value in made.items() if f".{dimensions['depth']}." not in name}


def theirs(model, x):
    """The embedding that the model's own evaluation uses."""
    with torch.no_grad():
        out = model(pixel_values=x)
    return out.last_hidden_state.mean(1) if "IJepa" in type(model).__name__ else out.pooler_output


def shrunk(name, **options):
    model = timm.create_model(name, num_classes=0, **options).eval()
    model.spec = Spec(TIMM + name, "imagenet", 0, 0, "head")
    return model


def fill(model, given, authors=""):
    """``model`` with the file's tensors in it; every one of them, and no other."""
    laid = translate(given, authors, model)
    model.load_state_dict(laid.tensors)
    return model, laid


def close(ours, expected):
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", [name for name, row in TRANSFORMERS.items() if row[2]])
def test_transformers_released(family, transformers, tmp_path):
    name, small, dimensions, arch, _ = TRANSFORMERS[family]
    tensors = released(saved(transformers, name, small, tmp_path)[1], dimensions)
    if dimensions[64] > 768:  # whose networks take long to build
        assert TIMM + arch in timm_candidates({k: v.shape for k, v in to_authors(tensors).items()})
        return
    found = checkpoint_of(tensors, hidden_act="quick_gelu").identify()
    assert (found.arch, found.image_size) == (TIMM + arch, 224)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformers(family, transformers, tmp_path):
    name, small, _, arch, options = TRANSFORMERS[family]
    model, tensors = saved(transformers, name, small, tmp_path)
    ours, laid = fill(shrunk(arch, **options), tensors)
    assert set(laid.left_out) <= {"embeddings.mask_token"}
    with torch.no_grad():
        close(ours(images(56)), theirs(model, images(56)))
        if "DINOv3" in family:  # whose positions are computed
            ours, _ = fill(shrunk(arch, **{**options, **({"img_size": 84} if "img_size" in options else {})}), tensors)
            close(ours(images(84)), theirs(model, images(84)))


@pytest.mark.parametrize(("kind", "config", "feature"), [
    ("ViTForImageClassification", "ViT", "auto"), ("ViTModel", "ViT", "auto"), ("ViTMSNModel", "ViTMSN", "auto"),
    ("ViTMAEForPreTraining", "ViTMAE", "mean")], ids=["ViT", "DINO", "MSN", "MAE"])
def test_plain_transformers_at_two_sizes(kind, config, feature, transformers, tmp_path, smallest):  # noqa: F811
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    more = {"mask_ratio": 0.0, **{f"decoder_{name}": 4 for name in shape}} if config == "ViTMAE" else {}

    def build(size):
        made = getattr(transformers, f"{config}Config")(**shape, **more, image_size=size, patch_size=16,
                                                                layer_norm_eps=1e-6)  # the authors'; its default: 1e-12
        return getattr(transformers, kind)(made).eval()

    model = randomise(build(32))
    model.save_pretrained(tmp_path)
    for size in (32, 48):
        encoder, report = load_frozen(tmp_path, image_size=size, feature=feature)
        assert (report.layout.partition(" ")[0], report.arch, report.image_size) == ("transformers", smallest, size)
        tensors, theirs = dict(model.state_dict()), build(size)
        for name in [name for name in tensors if name.endswith("position_embeddings")]:
            tensors[name] = timm.layers.resample_abs_pos_embed(tensors[name], [size // 16] * 2, num_prefix_tokens=1)
        theirs.load_state_dict({**theirs.state_dict(), **{k: v for k, v in tensors.items() if "decoder" not in k}})
        with torch.no_grad():
            out = getattr(theirs, "vit", theirs)(pixel_values=images(size)).last_hidden_state
            close(encoder.backbone(images(size)), out[:, 1:].mean(1) if feature == "mean" else out[:, 0])


def test_clips_projection(transformers, tmp_path):
    """Into the space of its texts: a tensor beside the image half's."""
    config = transformers.CLIPVisionConfig(**SMALL, **MLP, projection_dim=16)
    model = randomise(transformers.CLIPVisionModelWithProjection(config))
    model.save_pretrained(tmp_path)
    checkpoint, name = read_checkpoint(tmp_path), "vit_base_patch32_clip_quickgelu_224.openai"
    for size in (56, 84):
        ours = timm.create_model(name, num_classes=16, **{**OURS, "patch_size": 14, "img_size": size}).eval()
        ours.spec = Spec(TIMM + name, "imagenet", size, 16, "head")
        assert not checkpoint.load_into(ours).dropped
        if size == 56:
            with torch.no_grad():
                close(ours(images(56)), model(pixel_values=images(56)).image_embeds)
    report = checkpoint.load_into(shrunk(name, **OURS, patch_size=14))  # without it
    assert report.dropped == {"visual_projection.": 1}
