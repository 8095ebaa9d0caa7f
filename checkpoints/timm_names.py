"""The authors' files of timm's networks: which network a file can be, and timm's own converter for it.

For each model timm has a function that converts the authors' tensors into its own and resamples position embeddings. It
is used unchanged, and traced tensor by tensor, so that no tensor is dropped unnoticed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Size, Tensor, nn

from checkpoints.naming import EFFICIENTNET, efficientnet_names
from models.backbones import TIMM
from runtime.errors import UserError

POSITIONS = ("pos_embed", "pos_embedding", "relative_position_bias_table")  # what may be resampled
OPENAI = {"input_resolution", "context_length", "vocab_size"}  # in OpenAI's CLIP files, whose activation is QuickGELU
Names = Mapping[int, tuple[str, ...]]  # width -> timm's names


def _sized(pattern: str, **widths: int) -> Names:
    return {width: (pattern.format(size),) for size, width in widths.items()}


_DINOV3 = {width: tuple(f"vit_{size}_patch16_dinov3{qkvb}.lvd1689m" for size in sizes for qkvb in ("", "_qkvb")
                        if (size, qkvb) != ("7b", "_qkvb"))
           for width, sizes in {384: ("small", "small_plus"), 768: ("base",), 1024: ("large",), 1280: ("huge_plus",),
                                4096: ("7b",)}.items()}
# Names that must all be present ("!": absent), and the networks by width; the first row that matches is used.
FAMILIES: tuple[tuple[tuple[str, ...], Names], ...] = (
    (("storage_tokens",), _DINOV3),
    (("reg_token", r"blocks\.0\.gamma_1", "!pos_embed"), _DINOV3),
    (("(register_tokens|reg_token)$", r"blocks\.0\.ls1\.gamma"), {
        384: ("vit_small_patch14_reg4_dinov2.lvd142m",),
        768: ("vit_base_patch14_reg4_dinov2.lvd142m", "vit_base_patch14_reg1_tipsv2.webli"),
        1024: ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_large_patch14_reg1_tipsv2.webli"),
        1152: ("vit_so400m_patch14_reg1_tipsv2.webli",),
        1536: ("vit_giant_patch14_reg4_dinov2.lvd142m", "vit_giant_patch14_reg1_tipsv2.webli")}),
    ((r"blocks\.0\.ls1\.gamma",), {
        **_sized("vit_{}_patch14_dinov2.lvd142m", small=384, base=768, large=1024, giant=1536),
        1024: ("vit_large_patch14_dinov2.lvd142m", "vit_intern300m_patch14_448.ogvl_dist")}),
    (("downsample_layers|stem.0.", r"stages\.0\..*grn"), _sized(
        "convnextv2_{}.fcmae_ft_in1k", atto=40, femto=48, pico=64, nano=80, tiny=96, base=128, large=192, huge=352)),
    (("downsample_layers|stem.0.",), {
        96: ("convnext_tiny.dinov3_lvd1689m", "convnext_small.dinov3_lvd1689m"),
        128: ("convnext_base.dinov3_lvd1689m",), 192: ("convnext_large.dinov3_lvd1689m",)}),
    (("attn_pool.latent",), {
        768: ("vit_base_patch16_siglip_224.webli", "vit_base_patch32_siglip_256.v2_webli"),
        1024: ("vit_large_patch16_siglip_256.webli",),
        1152: ("vit_so400m_patch14_siglip_224.webli", "vit_so400m_patch16_siglip_256.v2_webli"),
        1536: ("vit_giantopt_patch16_siglip_256.v2_webli",)}),
    (("(visual.)?(class_embedding|cls_token)$", "(visual.)?(ln_pre|norm_pre)"), {
        256: ("vit_xsmall_patch16_clip_224.tinyclip_yfcc15m",),
        512: ("vit_medium_patch16_clip_224.tinyclip_yfcc15m", "vit_medium_patch32_clip_224.tinyclip_laion400m"),
        640: ("vit_betwixt_patch32_clip_224.tinyclip_laion400m",),
        768: ("vit_base_patch32_clip_224.laion2b", "vit_base_patch16_clip_224.laion2b",
              "vit_base_patch32_clip_quickgelu_224.openai", "vit_base_patch16_clip_quickgelu_224.openai"),
        896: ("vit_base_patch16_plus_clip_240.laion400m_e32",),
        1024: ("vit_large_patch14_clip_224.datacompxl", "vit_large_patch14_clip_224.laion2b",
               "vit_large_patch14_clip_quickgelu_224.openai"),
        1280: ("vit_huge_patch14_clip_224.laion2b", "vit_huge_patch14_clip_quickgelu_224.dfn5b"),
        1408: ("vit_giant_patch14_clip_224.laion2b",),
        1664: ("vit_gigantic_patch14_clip_224.laion2b", "vit_gigantic_patch14_clip_quickgelu_224.metaclip_2pt5b")}),
    (("visual.", r"visual\.blocks\.0\.attn\.(inner_attn_ln|q_proj|q_bias)"), {
        768: ("eva02_base_patch16_clip_224.merged2b",), 1024: ("eva02_large_patch14_clip_224.merged2b",),
        1408: ("eva_giant_patch14_clip_224.merged2b",)}),
    ((r"preprocessor\.patchifier\.proj",), {
        1024: ("aimv2_large_patch14_224.apple_pt",), 1536: ("aimv2_huge_patch14_224.apple_pt",),
        2048: ("aimv2_1b_patch14_224.apple_pt",), 3072: ("aimv2_3b_patch14_224.apple_pt",)}),
    ((r"radio_model\.model\.patch_generator",), {
        768: ("vit_base_patch16_radio_v3.c_radio",), 1024: ("vit_large_patch16_radio_v3.c_radio",),
        1152: ("vit_so400m_patch16_radio_v4.c_radio",),
        1280: ("vit_huge_patch16_radio_v3.c_radio", "vit_huge_patch16_radio_v4.c_radio"),
        1536: ("vit_giant_patch16_radio_v3.c_radio",)}),
    ((r"blocks\.0\.attn\.relative_position_bias_table",), {
        768: ("beit_base_patch16_224.in22k_ft_in22k", "beitv2_base_patch16_224.in1k_ft_in22k"),
        1024: ("beit_large_patch16_224.in22k_ft_in22k", "beitv2_large_patch16_224.in1k_ft_in22k")}),
    ((r"blocks\.0\.(attn\.q_bias|attn\.q_proj\.)",), {
        192: ("eva02_tiny_patch14_224.mim_in22k",), 384: ("eva02_small_patch14_224.mim_in22k",),
        768: ("eva02_base_patch14_224.mim_in22k",), 1024: ("eva02_large_patch14_224.mim_in22k",),
        1408: ("eva_giant_patch14_224.clip_ft_in1k",)}),
    (("!cls_token", "pos_embed", r"blocks\.0\.norm1"), {
        1280: ("vit_huge_patch14_gap_224.in1k_ijepa", "vit_huge_patch16_gap_448.in1k_ijepa"),
        1408: ("vit_giant_patch16_gap_224.in22k_ijepa",)}))
PATCHES = ("patch_embed.proj.weight", "visual.patch_embed.proj.weight", "visual.conv1.weight", "conv1.weight",
           "preprocessor.patchifier.proj.weight", "radio_model.model.patch_generator.embedder.weight",
           "downsample_layers.0.0.weight", "stem.0.weight")


def timm_candidates(shapes: Mapping[str, Size]) -> list[str]:
    """timm's networks that a trunk under its authors' names (:func:`checkpoints.authors.to_authors`) can be."""
    if EFFICIENTNET in shapes:
        lite = not any("._se_reduce." in name for name in shapes)
        sizes = [f"lite{n}" for n in range(5)] if lite else [*(f"b{n}" for n in range(9)), "l2"]
        return [f"{TIMM}tf_efficientnet_{size}" for size in sizes]
    width = next((shapes[name][0] for name in PATCHES if name in shapes), 0)
    for signs, names in FAMILIES:
        if all(any(re.match(sign.lstrip("!"), name) for name in shapes) != sign.startswith("!") for sign in signs):
            return [TIMM + name for name in names.get(width, ())]
    return []


def told_apart(archs: Sequence[str], act: str | None, normalised: bool) -> list[str]:
    """``archs``, which all have the same shapes, without those that contradict the file's activation ``act``, and only
    one of those that do not differ otherwise: in normalisation, unless that is ``normalised`` already, or in DINOv3's
    biases, which are then zero."""
    quick = [arch for arch in archs if "quickgelu" in arch]
    kept = [arch for arch in archs if act is None or not quick or (arch in quick) == (act == "quick_gelu")] or archs
    first = {(arch.partition(".")[0] if normalised else arch).replace("_qkvb", ""): arch for arch in reversed(kept)}
    return [arch for arch in kept if arch in first.values()]


def to_timm(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``tensors``, under the authors' names, as timm's network ``model`` names and shapes them.

    Raises whatever timm's converter raises for a file of another network.
    """
    if EFFICIENTNET in tensors:
        table = efficientnet_names({name: value.shape for name, value in tensors.items()})
        return {table.get(name, name): value for name, value in tensors.items()}
    wanted = model.state_dict()
    if all(name in tensors and tensors[name].shape == value.shape for name, value in wanted.items()) and all(
            name in wanted or name.startswith(model.spec.head_name + ".") for name in tensors):
        return dict(tensors)  # timm's already
    convert = converter(model.spec.arch.removeprefix(TIMM))
    halves = (torch.float16, torch.bfloat16)  # which a CPU does not resample
    tensors = {name: value.float() if value.dtype in halves else value for name, value in tensors.items()}
    with _quiet():
        return dict(convert(tensors, model)) if convert else tensors


@functools.cache
def converter(name: str) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    """timm's converter for the files of its model ``name``; None if it has none.

    timm builds each network by its public ``build_model_with_cfg``, which gets the converter as
    ``pretrained_filter_fn``. A mock receives that call, so nothing is built or downloaded.
    """
    from unittest import mock  # slow to import

    import timm

    entry = timm.model_entrypoint(name)
    asked = mock.Mock(return_value=mock.MagicMock())
    try:
        with mock.patch.object(sys.modules[entry.__module__], "build_model_with_cfg", asked):
            entry()
        return asked.call_args.kwargs.get("pretrained_filter_fn")
    except (AttributeError, TypeError):
        if not entry.__module__.startswith("timm."):  # a network of someone's own that timm knows by name
            return None
        raise UserError(f"timm {timm.__version__} keeps its converter for the files of {name} where this project does "
                        "not find it; pip install timm==1.0.31") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what converters print and log about resampling, because the report has it."""
    threshold = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(threshold)
