"""timm's tensors under the names that the networks' own authors give them, by their public code: the inverse of what
timm's converters do, for networks of any width and depth, with numbers or without."""

import re
from collections import namedtuple

import torch

from helpers.sources import under


def renamed(tensors, *pairs):
    """Every name by each pair (pattern, replacement) in turn."""
    for pattern, replacement in pairs:
        tensors = {re.sub(pattern, replacement, name): value for name, value in tensors.items()}
    return tensors


def width(tensors):
    return len(next(value for name, value in tensors.items() if name.endswith(("norm1.weight", "ln_1.weight"))))


def fused(tensors, block):
    """Queries', keys' and values' biases of a block in one tensor, those of keys zero."""
    q, v = (tensors.get(f"blocks.{block}.attn.{letter}_bias") for letter in "qv")
    if q is None or q.is_meta:
        return (torch.zeros if q is None else torch.ones)(3 * width(tensors))
    return torch.cat([q, torch.zeros_like(q), v])


def depth(tensors):
    return 1 + max(int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name)))


def plain(tensors):
    return dict(tensors)


def dinov2(tensors):
    """facebookresearch/dinov2; positions are of the class token too, and registers have none."""
    out = renamed(tensors, ("^reg_token", "register_tokens"), (r"mlp\.fc1_?", "mlp.fc1"))
    if "register_tokens" in out:
        of_class = torch.randn(out["cls_token"].shape, generator=torch.Generator().manual_seed(2))
        out["pos_embed"] = torch.cat([of_class.to(out["pos_embed"].device), out["pos_embed"]], dim=1)
        out["cls_token"] = out["cls_token"] - of_class.to(out["cls_token"].device)
    return {**out, "mask_token": torch.zeros(1, width(tensors))}


def dinov2_gated(tensors):
    """Its ViT-g."""
    return renamed(dinov2(tensors), (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3"))


def dinov2_training(tensors):
    """Its training's file: two networks, heads, blocks in chunks."""
    return {**under("teacher.backbone.", renamed(dinov2(tensors), (r"^blocks\.", "blocks.0."))),
            "teacher.dino_head.mlp.0.weight": torch.zeros(6, 6), "student.dino_head.mlp.0.weight": torch.zeros(6, 6)}


def dinov3(tensors):
    """facebookresearch/dinov3, its ViTs."""
    out = renamed({k: v for k, v in tensors.items() if not k.endswith(("q_bias", "v_bias"))},
                  ("^reg_token", "storage_tokens"), (r"gamma_(\d)", r"ls\1.gamma"))
    if "blocks.0.mlp.fc1_g.weight" in out:
        out = renamed(out, (r"mlp\.fc2", "mlp.w3"), (r"mlp\.fc1_g", "mlp.w1"), (r"mlp\.fc1_x", "mlp.w2"))
    for block in range(depth(tensors)):
        out[f"blocks.{block}.attn.qkv.bias"] = fused(tensors, block)
        out[f"blocks.{block}.attn.qkv.bias_mask"] = torch.full((3 * width(tensors),), torch.nan)
    heads = 2 if width(tensors) == 64 else width(tensors) // 64
    periods = width(tensors) // heads // 4
    return {**out, "mask_token": torch.zeros(1, width(tensors)),
            "rope_embed.periods": 100 ** (torch.arange(periods) / periods)}


def dinov3_convnext(tensors):
    """Its ConvNeXts, whose last norm is there twice."""
    out = renamed(tensors, (r"^stem\.", "downsample_layers.0."), (r"stages\.(\d)\.downsample", r"downsample_layers.\1"),
                  (r"stages\.(\d)\.blocks", r"stages.\1"), ("conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"),
                  (r"^head\.norm", "norm"))
    return {**out, **{f"norms.3.{kind}": out[f"norm.{kind}"] for kind in ("weight", "bias")}}


def eva02(tensors):
    """baaivision/EVA, EVA-02 after masked image modelling: Ti and S with fused gates, B and L without."""
    out = renamed(tensors, (r"mlp\.fc1_g", "mlp.w1"), (r"mlp\.fc1_x", "mlp.w2"), (r"mlp\.fc1", "mlp.w12"),
                  (r"mlp\.norm", "mlp.ffn_ln"), (r"mlp\.fc2", "mlp.w3"), (r"([qv])_proj\.bias", r"\1_bias"),
                  ("^fc_norm", "norm"))
    return {**out, "mask_token": torch.zeros(1, 1, width(tensors)), "lm_head.weight": torch.zeros(8, width(tensors)),
            "lm_head.bias": torch.zeros(8)}


def beit(tensors):
    """microsoft/unilm, BEiT after fine-tuning."""
    tables = [name for name in tensors if name.endswith("relative_position_bias_table")]
    return {**tensors, **{name.replace("bias_table", "index"): torch.zeros(5, 5, dtype=torch.int64) for name in tables},
            "head.weight": torch.ones(10, width(tensors)), "head.bias": torch.ones(10)}


def aimv2(tensors):
    """apple/ml-aim."""
    return renamed(tensors, (r"norm(\d)", r"norm_\1"), (r"mlp\.fc1_g", "mlp.fc1"), (r"mlp\.fc1_x", "mlp.fc3"),
                   (r"^patch_embed\.", "preprocessor.patchifier."), ("^pos_embed", "preprocessor.pos_embed"),
                   (r"^norm\.", "post_trunk_norm."), (r"^(blocks|post)", r"trunk.\1"))


TEXT = {"positional_embedding": torch.zeros(77, 512), "text_projection": torch.zeros(512, 512), "logit_scale":
        torch.zeros(()), "transformer.resblocks.0.ln_1.weight": torch.zeros(512), "ln_final.weight": torch.zeros(512)}
OPENAI = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}


def openclip(tensors):
    """mlfoundations/open_clip, and OpenAI's CLIP but for three numbers."""
    out = renamed(tensors, (r"patch_embed\.proj", "conv1"), ("norm_pre", "ln_pre"), (r"^norm\.", "ln_post."),
                  (r"blocks\.", "transformer.resblocks."), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
                  (r"attn\.qkv\.", "attn.in_proj_"), (r"attn\.proj", "attn.out_proj"), (r"\.norm(\d)", r".ln_\1"),
                  ("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"))
    out["class_embedding"] = out["class_embedding"].flatten()
    out["positional_embedding"] = out["positional_embedding"][0]
    if "head.weight" in out:  # the projection, the other way round
        out["proj"] = out.pop("head.weight").T
        del out["head.bias"]
    return {**under("visual.", {"proj": torch.ones(width(tensors), 8), **out}), **TEXT}


def openai(tensors):
    return {**openclip(tensors), **OPENAI}


def siglip(tensors):
    """OpenCLIP's, whose image half is timm's."""
    return {**under("visual.trunk.", tensors), "text.ln.weight": torch.zeros(3), "logit_bias": torch.zeros(())}


def eva_clip(tensors):
    """baaivision/EVA, EVA-CLIP: a projection behind the image half."""
    out = renamed(tensors, (r"mlp\.fc1_g", "mlp.w1"), (r"mlp\.fc1_x", "mlp.w2"), (r"mlp\.norm", "mlp.ffn_ln"),
                  (r"attn\.norm", "attn.inner_attn_ln"), (r"([qv])_proj\.bias", r"\1_bias"))
    if "blocks.0.mlp.w1.weight" in out:
        out = renamed(out, (r"mlp\.fc2", "mlp.w3"))
    return {**under("visual.", {**out, "head.weight": torch.ones(8, width(tensors)), "head.bias": torch.ones(8)}),
            "text.ln_final.weight": torch.zeros(3), "logit_scale": torch.zeros(())}


def ijepa(tensors):
    """facebookresearch/ijepa's training file."""
    return {"encoder": under("module.", {k: torch.zeros_like(v) for k, v in tensors.items()}),
            "target_encoder": under("module.", tensors), "predictor": {"module.mask_token": torch.zeros(1, 1, 4)},
            "opt": {"state": {}}, "scaler": None, "epoch": 300}


def radio(tensors):
    """NVlabs/RADIO: patches by a matrix, all class tokens and registers in one tensor, a table of 128 x 128."""
    kept = {k: v for k, v in tensors.items() if k.startswith("blocks.")}
    table = torch.randn(1, 128 ** 2, width(tensors), generator=torch.Generator().manual_seed(3))
    odd = {"embedder.weight": tensors["patch_embed.proj.weight"].flatten(1), "pos_embed": table,
           "cls_token.token": torch.cat([tensors["cls_token"], tensors["reg_token"]], 1)[0]}
    return {**under("radio_model.model.", {**kept, **under("patch_generator.", odd)}),
            "radio_model.input_conditioner.norm_mean": torch.zeros(3, 1, 1), "radio_model.summary_idxs": torch.zeros(3)}


SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 2}
PATCH14, PATCH16, PATCH32 = (56, 84), (64, 96), (64, 96)
Family = namedtuple("Family", "network names sizes options", defaults=(PATCH16, SMALL))
# timm's network with the tag that is found, its authors' names, sizes that are compared, arguments that shrink it
FILES = {
    "DINOv2": Family("vit_small_patch14_dinov2.lvd142m", dinov2, PATCH14),
    "DINOv2, registers": Family("vit_small_patch14_reg4_dinov2.lvd142m", dinov2, PATCH14),
    "DINOv2, training": Family("vit_small_patch14_dinov2.lvd142m", dinov2_training, PATCH14),
    "DINOv2, giant": Family("vit_giant_patch14_dinov2.lvd142m", dinov2_gated, PATCH14,
                            {**SMALL, "mlp_ratio": 5.5}),
    "DINOv3": Family("vit_small_patch16_dinov3.lvd1689m", dinov3),
    "DINOv3 with biases": Family("vit_small_patch16_dinov3_qkvb.lvd1689m", dinov3),
    "DINOv3 S+": Family("vit_small_plus_patch16_dinov3.lvd1689m", dinov3),
    "DINOv3, ConvNeXt": Family("convnext_tiny.dinov3_lvd1689m", dinov3_convnext, PATCH16,
                               {"dims": (8, 16, 32, 64)}),
    "EVA-02": Family("eva02_tiny_patch14_224.mim_in22k", eva02, PATCH14),
    "EVA-02 B": Family("eva02_base_patch14_224.mim_in22k", eva02, PATCH14),
    "EVA-CLIP": Family("eva02_base_patch16_clip_224.merged2b", eva_clip),
    "EVA-CLIP, giant": Family("eva_giant_patch14_clip_224.merged2b", eva_clip, PATCH14),
    "OpenAI's CLIP": Family("vit_base_patch32_clip_quickgelu_224.openai", openai, PATCH32),
    "SigLIP": Family("vit_base_patch16_siglip_224.webli", siglip),
    "I-JEPA": Family("vit_huge_patch14_gap_224.in1k_ijepa", ijepa, PATCH14),
    "AIMv2": Family("aimv2_large_patch14_224.apple_pt", aimv2, PATCH14),
    "BEiT": Family("beit_base_patch16_224.in22k_ft_in22k", beit),
    "RADIO": Family("vit_base_patch16_radio_v3.c_radio", radio),
}
