"""Other libraries' names for the tensors of torchvision's networks, as pairs of prefixes, in both directions.

A rule is a pair (their prefix, torchvision's prefix); ``{i}`` and ``{j}`` stand for numbers. What follows the prefix
(``weight``, ``running_mean`` ...) is the same on both sides.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping

from torch import Size

_LAYER = "encoder.layers.encoder_layer_{i}."
_BLOCK = [(f"conv{n}.norm.", f"bn{n}.") for n in (1, 2, 3)] + [(f"conv{n}.", f"conv{n}.") for n in (1, 2, 3)] + [
    ("shortcut.norm.", "downsample.1."), ("shortcut.", "downsample.0.")]

SCHEMES: dict[str, tuple[tuple[str, str], ...]] = {
    # timm's VisionTransformer, and DINO's and MoCo v3's, which are built on it
    "timm ViT": (
        ("cls_token", "class_token"), ("patch_embed.proj.", "conv_proj."), ("pos_embed", "encoder.pos_embedding"),
        ("blocks.{i}.norm1.", _LAYER + "ln_1."), ("blocks.{i}.norm2.", _LAYER + "ln_2."),
        ("blocks.{i}.attn.qkv.", _LAYER + "self_attention.in_proj_"),
        ("blocks.{i}.attn.proj.", _LAYER + "self_attention.out_proj."),
        ("blocks.{i}.mlp.fc1.", _LAYER + "mlp.0."), ("blocks.{i}.mlp.fc2.", _LAYER + "mlp.3."),
        ("norm.", "encoder.ln."), ("head.", "heads.head.")),
    # nn.Sequential(*resnet.children()), as lightly's examples build their backbones
    "positional": (("0.", "conv1."), ("1.", "bn1."), *((f"{n + 3}.", f"layer{n}.") for n in (1, 2, 3, 4))),
    "detectron2": (
        ("stem.conv1.norm.", "bn1."), ("stem.conv1.", "conv1."), ("stem.fc.", "fc."),
        *((f"res{stage + 1}.{{i}}.{theirs}", f"layer{stage}.{{i}}.{ours}")
          for stage in (1, 2, 3, 4) for theirs, ours in _BLOCK)),
    # torchvision's own DenseNet files, from before module names could not hold dots
    "old DenseNet": tuple((f"features.denseblock{{i}}.denselayer{{j}}.{part}.{n}.",
                           f"features.denseblock{{i}}.denselayer{{j}}.{part}{n}.") for part in ("norm", "conv")
                          for n in (1, 2)),
}
SIGNATURES = {  # all of these names must be present
    "timm ViT": ("cls_token", "patch_embed.proj.weight"),
    "positional": ("0.weight", "1.weight", "4.0.conv1.weight"),
    "detectron2": ("stem.conv1.weight", "res2.0.conv1.weight"),
    "old DenseNet": ("features.denseblock1.denselayer1.norm.1.weight",),
}
EFFICIENTNET = "_conv_stem.weight"  # of the package efficientnet_pytorch


def efficientnet_names(shapes: Mapping[str, Size]) -> dict[str, str]:
    """efficientnet_pytorch's names -> timm's ``tf_efficientnet_*``, of Lite as well.

    There blocks are numbered through, in timm by stage: one begins where the number of output channels changes.
    """
    table, stage, number, width = {}, -1, 0, 0
    outside = {"_conv_stem.": "conv_stem.", "_bn0.": "bn1.", "_conv_head.": "conv_head.", "_bn1.": "bn2.",
               "_fc.": "classifier."}
    inside = {"_depthwise_conv.": "conv_dw.", "_se_reduce.": "se.conv_reduce.", "_se_expand.": "se.conv_expand."}
    for block in range(sum(name.endswith("._project_conv.weight") for name in shapes)):
        place = f"_blocks.{block}."
        out = shapes[place + "_project_conv.weight"][0]
        stage, number, width = (stage, number + 1, width) if out == width else (stage + 1, 0, out)
        parts = ({"_expand_conv.": "conv_pw.", "_bn0.": "bn1.", "_bn1.": "bn2.", "_project_conv.": "conv_pwl.",
                  "_bn2.": "bn3."} if place + "_expand_conv.weight" in shapes else
                 {"_bn1.": "bn1.", "_project_conv.": "conv_pw.", "_bn2.": "bn2."})
        outside |= {place + theirs: f"blocks.{stage}.{number}.{ours}" for theirs, ours in {**inside, **parts}.items()}
    for name in shapes:
        layer, _, leaf = name.rpartition(".")
        if layer + "." in outside:
            table[name] = outside[layer + "."] + leaf
    return table


def find_scheme(names: Collection[str]) -> str | None:
    """The scheme of these names; None for torchvision's names and unknown names."""
    return next((scheme for scheme, signs in SIGNATURES.items() if all(sign in names for sign in signs)), None)


def rename(name: str, scheme: str | None, inverse: bool = False) -> str:
    """torchvision's name for ``name`` in the scheme (with ``inverse``, the other way round); unknown names stay."""
    if not scheme:
        return name
    rules = SCHEMES[scheme]
    return substitute(name, compile_rules(tuple((ours, theirs) for theirs, ours in rules) if inverse else rules))


def substitute(name: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    """``name`` changed by the first of ``rules`` (of :func:`compile_rules`) that matches; unchanged if none does."""
    for pattern, replacement in rules:
        if pattern.match(name):
            return pattern.sub(replacement, name, count=1)
    return name


@functools.cache
def compile_rules(rules: tuple[tuple[str, str], ...]) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Pairs (prefix, its replacement), in which ``{i}`` and ``{j}`` stand for numbers, as patterns."""
    def rule(old: str, new: str) -> tuple[re.Pattern[str], str]:
        pattern = "^" + re.escape(old).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
        return re.compile(pattern), new.replace("{i}", r"\g<i>").replace("{j}", r"\g<j>")
    return tuple(rule(*pair) for pair in rules)
