"""Files as today's teachers' authors name them: the network is found from names and shapes, at its released size.

The tensors lie nowhere but where their numbers decide. What timm's converters compute is timm's; that each is reached,
and that nothing is lost on the way, is checked here, on a small DINOv2 also by its features.
"""

import re
from pathlib import Path

import pytest
import torch
from helpers.sources import (
    _no_initialisation,  # noqa: F401
    images,
    randomise,
    under,
)

from checkpoints.frozen import load_frozen
from checkpoints.identify import Identity, hollow_trunk
from checkpoints.layouts import LAYOUTS, TRANSFORMERS, find_layout
from checkpoints.match import Checkpoint
from checkpoints.timm_names import converter
from runtime.errors import UserError

timm = pytest.importorskip("timm", reason="these networks are timm's; pip install timm")


def hollow(name):
    model = hollow_trunk(Identity(f"timm:{name}", "imagenet", 224))
    return {key: torch.empty(value.shape, device="meta") for key, value in model.state_dict().items()}


def renamed(tensors, *pairs):
    """Every name by each pair (pattern, replacement) in turn."""
    for pattern, replacement in pairs:
        tensors = {re.sub(pattern, replacement, name): value for name, value in tensors.items()}
    return tensors


def dinov2(tensors):
    return {**renamed(tensors, ("^reg_token", "register_tokens")), "mask_token": torch.zeros(1, 384)}


def dinov3(name, bias=torch.zeros):
    tensors = renamed(hollow(name), ("^reg_token", "storage_tokens"), (r"gamma_(\d)", r"ls\1.gamma"))
    if "blocks.0.mlp.fc1_g.weight" in tensors:
        tensors = renamed(tensors, (r"mlp\.fc2", "mlp.w3"), (r"mlp\.fc1_g", "mlp.w1"), (r"mlp\.fc1_x", "mlp.w2"))
    for block in range(12):
        tensors[f"blocks.{block}.attn.qkv.bias"] = bias(1152)
        tensors[f"blocks.{block}.attn.qkv.bias_mask"] = torch.full((1152,), torch.nan)
    return {**tensors, "mask_token": torch.zeros(1, 384), "rope_embed.periods": 100 ** (torch.arange(16) / 16)}


def eva02():
    tensors = renamed(hollow("eva02_tiny_patch14_224"), (r"mlp\.fc1_g", "mlp.w1"), (r"mlp\.fc1_x", "mlp.w2"),
                      (r"mlp\.norm", "mlp.ffn_ln"), (r"mlp\.fc2", "mlp.w3"), (r"([qv])_proj\.bias", r"\1_bias"),
                      ("^fc_norm", "norm"))
    return {**tensors, "mask_token": torch.zeros(1, 1, 192), "lm_head.weight": torch.zeros(8, 192),
            "lm_head.bias": torch.zeros(8), "rope.freqs_cos": torch.zeros(256, 64)}


def clip(**marks):
    tensors = renamed(
        hollow("vit_base_patch32_clip_224"), (r"patch_embed\.proj", "conv1"), ("norm_pre", "ln_pre"), (r"^norm\.",
        "ln_post."), (r"blocks\.", "transformer.resblocks."), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
        (r"attn\.qkv\.", "attn.in_proj_"), (r"attn\.proj", "attn.out_proj"), (r"\.norm(\d)", r".ln_\1"),
        ("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"))
    flat = {name: torch.empty(shape, device="meta") for name, shape in (
        ("class_embedding", 768), ("positional_embedding", (50, 768)))}
    return {**under("visual.", {**tensors, **flat, "proj": torch.empty(768, 512, device="meta")}), **TEXT, **marks}


TEXT = {"positional_embedding": torch.zeros(77, 512), "text_projection": torch.zeros(512, 512), "logit_scale":
        torch.zeros(()), "transformer.resblocks.0.ln_1.weight": torch.zeros(512), "ln_final.weight": torch.zeros(512)}
OPENAI = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}


def radio():
    tensors = hollow("vit_base_patch16_radio_v3")
    width, more = tensors["pos_embed"].shape[-1], 1 + tensors["reg_token"].shape[1]
    odd = {name: torch.empty(shape, device="meta") for name, shape in (
        ("embedder.weight", (width, 768)), ("pos_embed", (1, 128 ** 2, width)), ("cls_token.token", (more, width)))}
    kept = {k: v for k, v in tensors.items() if k.startswith("blocks.")}
    return {**under("radio_model.model.", {**kept, **under("patch_generator.", odd)}),
            "radio_model.input_conditioner.norm_mean": torch.zeros(3, 1, 1), "radio_model.summary_idxs": torch.zeros(3)}


FILES = {
    "DINOv2, training": (lambda: {
        **under("teacher.backbone.", renamed(dinov2(hollow("vit_small_patch14_dinov2")), (r"^blocks\.", "blocks.0."))),
        "teacher.dino_head.mlp.0.weight": torch.zeros(6, 6), "student.dino_head.mlp.0.weight": torch.zeros(6, 6)},
        "vit_small_patch14_dinov2.lvd142m"),
    "DINOv3": (lambda: dinov3("vit_small_patch16_dinov3"), "vit_small_patch16_dinov3.lvd1689m"),
    "DINOv3 with biases": (lambda: dinov3("vit_small_patch16_dinov3", torch.ones),
                           "vit_small_patch16_dinov3_qkvb.lvd1689m"),
    "DINOv3 S+": (lambda: dinov3("vit_small_plus_patch16_dinov3"), "vit_small_plus_patch16_dinov3.lvd1689m"),
    "EVA-02": (eva02, "eva02_tiny_patch14_224.mim_in22k"),
    "OpenAI's CLIP": (lambda: clip(**OPENAI), "vit_base_patch32_clip_quickgelu_224.openai"),
    "SigLIP": (lambda: {**under("visual.trunk.", hollow("vit_base_patch16_siglip_224")), "text.ln.weight":
                        torch.zeros(3), "logit_bias": torch.zeros(())}, "vit_base_patch16_siglip_224.webli"),
    "AIMv2": (lambda: renamed(
        hollow("aimv2_large_patch14_224"), (r"norm(\d)", r"norm_\1"), (r"mlp\.fc1_g", "mlp.fc1"), (r"mlp\.fc1_x",
        "mlp.fc3"), (r"^patch_embed\.", "preprocessor.patchifier."), ("^pos_embed", "preprocessor.pos_embed"),
        (r"^norm\.", "post_trunk_norm."), (r"^(blocks|post)", r"trunk.\1")), "aimv2_large_patch14_224.apple_pt"),
    "RADIO": (radio, "vit_base_patch16_radio_v3.c_radio"),
}


LAYOUTS_BY_NAMES = {  # those that FILES leaves out; names -> layout, its prefix
    "CLIP (image half)": (("class_embedding", "conv1.weight", "transformer.resblocks.0.ln_1.weight"), ""),
    "MAE": (("cls_token", "patch_embed.proj.weight", "decoder_embed.weight", "mask_token"), ""),
    "I-JEPA, MSN": (("encoder.patch_embed.proj.weight", "target_encoder.patch_embed.proj.weight"), "target_encoder."),
    "transformers": (("embeddings.patch_embeddings.projection.weight", "pooler.dense.weight"), ""),
    "transformers (CLIP, SigLIP)": (("vision_model.embeddings.patch_embedding.weight", "text_model.a"),
                                    "vision_model."),
    **{f"transformers ({prefix[:-1]})": ((f"{prefix}embeddings.patch_embeddings.projection.weight",), prefix)
       for prefix in TRANSFORMERS},
}


@pytest.mark.parametrize("name", LAYOUTS_BY_NAMES)
def test_layout(name):
    names, prefix = LAYOUTS_BY_NAMES[name]
    found = find_layout({key: torch.empty(8, 3, 4, 4) for key in names})
    assert (found.name, found.prefix) == (name, prefix)


def test_every_layout_of_transformers_is_there():
    theirs = ("CLIP", "transformers", "I-JEPA", "MAE", "RADIO")
    listed = {layout.name for layout in LAYOUTS if layout.name.startswith(theirs)}
    assert listed == {*LAYOUTS_BY_NAMES, "CLIP", "CLIP (timm's trunk)", "RADIO"}


def checkpoint_of(tensors):
    layout = find_layout(tensors)
    return Checkpoint(Path("file"), "--distill", layout, "", layout.prefix, tensors, {}, {})


@pytest.mark.parametrize("family", FILES)
def test_found(family):
    make, arch = FILES[family]
    found = checkpoint_of(make()).identify()
    assert (found.arch, found.image_size) == (f"timm:{arch}", 224)


def test_what_no_name_tells_apart_is_listed():
    with pytest.raises(UserError, match=r"fits timm:vit_base_patch32_clip_224\.laion2b, timm:vit_base_patch32_clip_"
                       r"quickgelu_224\.openai, which .* give --teacher-arch with the one that it is"):
        checkpoint_of(clip()).identify(arch_flag="--teacher-arch")


@pytest.fixture(scope="module")
def small():
    """DINOv2's ViT-S with registers, in its authors' names, with the positions of 112 pixels."""
    model = randomise(timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=112))
    tensors = dinov2({k: v.clone() for k, v in model.state_dict().items()})
    of_class = torch.randn(1, 1, 384, generator=torch.Generator().manual_seed(2))
    tensors["pos_embed"] = torch.cat([of_class, tensors["pos_embed"]], dim=1)
    tensors["cls_token"] = tensors["cls_token"] - of_class
    return model, tensors


def test_features_are_timms(small, tmp_path):
    model, tensors = small
    torch.save({"model": under("module._orig_mod.", tensors)}, tmp_path / "file.pth")
    for size, resampled in ((112, False), (70, True)):
        encoder, report = load_frozen(tmp_path / "file.pth", image_size=size)
        model.set_input_size(img_size=size)  # resamples as timm does
        with torch.no_grad():
            expected = model(images(size))
            assert (encoder.backbone(images(size)) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert report.arch == "timm:vit_small_patch14_reg4_dinov2.lvd142m"
        assert ("positions resampled from 8x8 to 5x5" in report.notes) == resampled
        assert report.dropped == {"mask_token": 1}
        assert report.reasons == {"mask_token": "left out by timm's converter"}


def test_what_is_wrong_is_said_and_not_the_flag_that_was_given(small, tmp_path):
    _, tensors = small
    named, asked = "timm:vit_small_patch14_reg4_dinov2", "timm:vit_small_patch14_dinov2"

    def refusal(content, arch):
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(UserError) as caught:
            load_frozen(tmp_path / "file.pth", arch, image_size=112)
        return str(caught.value)

    assert f"it fits {named}.lvd142m" in refusal(tensors, asked)
    text = refusal({k: v for k, v in tensors.items() if k != "blocks.3.ls1.gamma"}, named)
    assert "1 missing (blocks.3.ls1.gamma)" in text
    assert "--arch timm:NAME" not in text
    broken = {**tensors, "blocks.3.attn.qkv.weight": tensors["blocks.3.attn.qkv.weight"] * torch.nan}
    assert "blocks.3.attn.qkv.weight holds 442,368 NaN" in refusal(broken, None)
    odd = {**tensors, "patch_embed.proj.weight": torch.ones(384, 3, 16, 16)}  # which timm would resample
    assert "1 of another shape (patch_embed.proj.weight" in refusal(odd, named)
    assert "left over (blocks.12.ls1.gamma)" in refusal({**tensors, "blocks.12.ls1.gamma": torch.ones(384)}, named)


@pytest.mark.parametrize(("name", "wanted"), [
    ("vit_small_patch14_dinov2", {}), ("eva02_tiny_patch14_224", {}), ("beit_base_patch16_224", {}), (
        "convnext_tiny", {}), ("regnety_160", {}), ("tf_efficientnet_lite0", None), (
        "vit_base_patch16_radio_v3", {"interpolation": "bilinear", "antialias": False, "align_corners": True})])
def test_timms_converter_is_where_it_is_looked_for(name, wanted):
    """It is no part of timm's documented interface; the oracle is what timm would load with, if it were let to."""
    used = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("timm.models._builder.load_pretrained", lambda *_, **options: used.append(options["filter_fn"]))
        timm.create_model(name, pretrained=True)
    found = converter(name)
    if wanted is None:
        assert found is None is used[0]
        return
    ours, theirs = ((getattr(x, "func", x), getattr(x, "keywords", {})) for x in (found, used[0]))
    assert ours == theirs and ours[1] == wanted


def test_a_timm_that_keeps_its_converters_elsewhere_is_refused(monkeypatch):
    monkeypatch.delattr("timm.models.vision_transformer.build_model_with_cfg")
    converter.cache_clear()
    with pytest.raises(UserError, match=r"^timm [\d.]+ keeps its converter for the files of vit_tiny_patch16_224"):
        converter("vit_tiny_patch16_224")
