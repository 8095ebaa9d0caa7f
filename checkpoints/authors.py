"""Renaming tensors from several libraries' names to those of the networks' authors.

Those are what timm's converters read, and for plain vision transformers timm's own names. Read here: Hugging Face
transformers (queries, keys and values apart) and DINOv2's training (blocks in chunks).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from checkpoints.naming import compile_rules, substitute

_ATTENTION = {"query": "q", "key": "k", "value": "v", "q_proj": "q", "k_proj": "k", "v_proj": "v"}
_VIT = (  # of DINOv2 too, with and without registers
    ("embeddings.cls_token", "cls_token"), ("embeddings.mask_token", "mask_token"),
    ("embeddings.position_embeddings", "pos_embed"), ("embeddings.register_tokens", "register_tokens"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    *((f"encoder.layer.{{i}}.attention.attention.{theirs}.", f"blocks.{{i}}.attn.{_ATTENTION[theirs]}.")
      for theirs in ("query", "key", "value")),
    ("encoder.layer.{i}.attention.output.dense.", "blocks.{i}.attn.proj."),
    ("encoder.layer.{i}.intermediate.dense.", "blocks.{i}.mlp.fc1."),
    ("encoder.layer.{i}.output.dense.", "blocks.{i}.mlp.fc2."),
    ("encoder.layer.{i}.layernorm_before.", "blocks.{i}.norm1."),
    ("encoder.layer.{i}.layernorm_after.", "blocks.{i}.norm2."),
    ("encoder.layer.{i}.layer_scale1.lambda1", "blocks.{i}.ls1.gamma"),
    ("encoder.layer.{i}.layer_scale2.lambda1", "blocks.{i}.ls2.gamma"),
    ("encoder.layer.{i}.mlp.weights_in.", "blocks.{i}.mlp.w12."),
    ("encoder.layer.{i}.mlp.weights_out.", "blocks.{i}.mlp.w3."),
    ("encoder.layer.{i}.", "blocks.{i}."), ("layernorm.", "norm."))
_DINOV3 = (
    ("embeddings.cls_token", "cls_token"), ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "storage_tokens"), ("embeddings.patch_embeddings.", "patch_embed.proj."),
    *((f"layer.{{i}}.attention.{theirs}.", f"blocks.{{i}}.attn.{_ATTENTION[theirs]}.")
      for theirs in ("q_proj", "k_proj", "v_proj")),
    ("layer.{i}.attention.o_proj.", "blocks.{i}.attn.proj."),
    ("layer.{i}.layer_scale1.lambda1", "blocks.{i}.ls1.gamma"),
    ("layer.{i}.layer_scale2.lambda1", "blocks.{i}.ls2.gamma"), ("layer.{i}.", "blocks.{i}."))
_PLAIN_MLP = (("layer.{i}.mlp.up_proj.", "blocks.{i}.mlp.fc1."), ("layer.{i}.mlp.down_proj.", "blocks.{i}.mlp.fc2."))
_GATED_MLP = tuple((f"layer.{{i}}.mlp.{theirs}_proj.", f"blocks.{{i}}.mlp.{ours}.")
                   for theirs, ours in (("gate", "w1"), ("up", "w2"), ("down", "w3")))
_CLIP = (  # SigLIP's too, whose head is an attention
    ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding.weight", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."), ("pre_layrnorm.", "norm_pre."), ("post_layernorm.", "norm."),
    *((f"encoder.layers.{{i}}.self_attn.{theirs}.", f"blocks.{{i}}.attn.{_ATTENTION[theirs]}.")
      for theirs in ("q_proj", "k_proj", "v_proj")),
    ("encoder.layers.{i}.self_attn.out_proj.", "blocks.{i}.attn.proj."),
    ("encoder.layers.{i}.layer_norm1.", "blocks.{i}.norm1."), ("encoder.layers.{i}.layer_norm2.", "blocks.{i}.norm2."),
    ("encoder.layers.{i}.", "blocks.{i}."), ("head.probe", "attn_pool.latent"),
    ("head.attention.in_proj_", "attn_pool.qkv."), ("head.attention.out_proj.", "attn_pool.proj."),
    ("head.layernorm.", "attn_pool.norm."), ("head.mlp.", "attn_pool.mlp."))
_CONVNEXT = (
    ("stages.{i}.downsample_layers.{j}.", "downsample_layers.{i}.{j}."),
    *((f"stages.{{i}}.layers.{{j}}.{theirs}.", f"stages.{{i}}.{{j}}.{ours}.") for theirs, ours in (
        ("depthwise_conv", "dwconv"), ("layer_norm", "norm"), ("pointwise_conv1", "pwconv1"),
        ("pointwise_conv2", "pwconv2"))),
    ("stages.{i}.layers.{j}.gamma", "stages.{i}.{j}.gamma"), ("layer_norm.", "norm."))
LIBRARIES = (  # a name that only files of this kind have, and the rules for renaming; the first that matches is used
    (r"encoder\.layer\.0\.", _VIT), (r"layer\.0\.mlp\.gate_proj\.", (*_GATED_MLP, *_DINOV3)),
    (r"layer\.0\.attention\.q_proj\.", (*_PLAIN_MLP, *_DINOV3)),
    (r"embeddings\.patch_embedding\.", _CLIP), (r"stages\.0\.layers\.0\.depthwise_conv\.", _CONVNEXT),
    (r"blocks\.\d+\.\d+\.norm1\.", (("blocks.{i}.{j}.", "blocks.{j}."),)))


def to_authors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` (a branch, without its prefix) under the authors' names; unknown names stay."""
    patterns = compile_rules(rules_for(tensors))
    named = {substitute(name, patterns): value for name, value in tensors.items()}
    return dict(_shaped(_joined(named))) if patterns else named


def rules_for(names: Collection[str]) -> tuple[tuple[str, str], ...]:
    """The renaming rules of the library that these names come from; () for none."""
    return next((rules for sign, rules in LIBRARIES if any(re.match(sign, name) for name in names)), ())


def _joined(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join queries, keys and values of each layer into one tensor; a missing bias is zero."""
    out: dict[str, Tensor] = {}
    for name, value in named.items():
        layer, _, part = name.partition(".attn.")
        if part not in {f"{letter}.{kind}" for letter in "qkv" for kind in ("weight", "bias")}:
            out[name] = value
            continue
        whole = f"{layer}.attn.qkv.{part[2:]}"
        if whole not in out:
            three = [named.get(f"{layer}.attn.{letter}.{part[2:]}") for letter in "qkv"]
            out[whole] = torch.cat([torch.zeros_like(value) if x is None else x for x in three])
    return out


def _shaped(named: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What transformers keeps in fewer dimensions than timm, SigLIP's pooling, whose query timm keeps apart, and CLIP's
    projection, which has a bias in timm."""
    for name, value in named.items():
        if name == "cls_token" and value.ndim == 1:
            yield name, value[None, None]
        elif name == "pos_embed" and value.ndim == 2:
            yield name, value[None]
        elif name == "visual_projection.weight":  # CLIP's, into the space of its texts
            yield from (("head.weight", value), ("head.bias", value.new_zeros(len(value))))
        elif name.startswith("attn_pool.qkv."):
            kind, width = name.rpartition(".")[2], len(value) // 3
            yield from ((f"attn_pool.q.{kind}", value[:width]), (f"attn_pool.kv.{kind}", value[width:]))
        else:
            yield name, value


class Trace(TorchFunctionMode):
    """Records, for each tensor that is computed within the block, which of ``tensors`` it depends on."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(value): (name,) for name, value in tensors.items()}
        self._kept = list(tensors.values())  # keeps them alive, because ids of deleted objects are used again

    def __torch_function__(self, func, types, positional=(), named=None):  # noqa: ANN001, ANN204
        made = func(*positional, **(named or {}))
        given = [name for x in tree_leaves((positional, named)) for name in self._names.get(id(x), ())
                 if isinstance(x, Tensor)]
        for x in tree_leaves(made) if given else ():
            if isinstance(x, Tensor):
                self._names.setdefault(id(x), tuple(dict.fromkeys(given)))
                self._kept.append(x)
        return made

    def sources(self, tensor: Tensor) -> tuple[str, ...]:
        """The names of the tensors that ``tensor`` depends on; none if it depends on none of them."""
        return self._names.get(id(tensor), ())
