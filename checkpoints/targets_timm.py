"""Export to timm's names, for the networks that timm has too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from checkpoints.naming import compile_rules, efficientnet_names, rename, substitute
from checkpoints.snippets import feature_edit, run_code, timm_arguments, timm_call
from checkpoints.targets import Network, Target
from models.backbones import TIMM
from models.original import EFFICIENTNETS, ORIGINALS, name_there
from runtime.own import is_own

VIT_WIDTHS = {192: ("tiny", 3), 384: ("small", 6), 768: ("base", 12), 1024: ("large", 16), 1280: ("huge", 16)}
# timm's networks that have torchvision's tensors under other names but in the same order, apart from LAST, and what
# their builder must be told; which of them are one function is seen when the features are compared
_EPS = {"bn_eps": 1e-3}
_REGNETS = {"400mf": "004", "800mf": "008", "1_6gf": "016", "3_2gf": "032", "8gf": "080", "16gf": "160", "32gf": "320",
            "128gf": "1280"}
_OF_TORCHVISION = {"regnetx_004", "regnety_008", "regnety_080"}  # whose widths are not the paper's
IN_ORDER: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"efficientnet_b{n}": (f"efficientnet_b{n}", _EPS if n > 4 else {}) for n in range(8)},
    **{f"efficientnet_v2_{size}": (f"efficientnetv2_{size}", _EPS) for size in "sml"},
    **{f"convnext_{size}": (f"convnext_{size}", {}) for size in ("tiny", "small", "base", "large")},
    **{f"mobilenet_v3_{size}": (f"mobilenetv3_{size}_100", _EPS) for size in ("large", "small")},
    **{f"mnasnet{n.replace('.', '_')}": (f"mnasnet_{n.replace('.', '')}0".replace("750", "75"), {}) for n in (
        "0.5", "0.75", "1.0")},
    **{f"regnet_{kind}_{size}": (name + "_tv" * (name in _OF_TORCHVISION), {}) for kind in "xy"
       for size, number in _REGNETS.items() for name in [f"regnet{kind}_{number}"] if (kind, number) != ("x", "1280")},
    **{name: (name, {}) for depth in (11, 13, 16, 19) for name in (f"vgg{depth}", f"vgg{depth}_bn")},
    "inception_v3": ("inception_v3", {}), "mobilenet_v2": ("mobilenetv2_100", {})}
LAST = re.compile(r"(?P<block>.*\.block\d-\d+)\.(?P<last>proj\.)?")  # RegNet's shortcut, which timm declares last
# timm's Swin of the same function at multiples of the size in its name
SWINS: dict[str, tuple[str, dict[str, Any]]] = {
    f"swin_{version}{size[0]}": (f"swin{name}", {}) for size in ("tiny", "small", "base")
    for version, name in (("", f"_{size}_patch4_window7_224"), ("v2_", f"v2_{size}_window8_256"))}
# torchvision's names and timm's; in torchvision's, stages alternate with what is before each but the first
SWIN_NAMES = (("features.0.0.", "patch_embed.proj."), ("features.0.2.", "patch_embed.norm."), *(
    (f"features.{2 * stage + 1}.{{j}}.{ours}", f"layers.{stage}.blocks.{{j}}.{theirs}") for stage in range(4)
    for ours, theirs in (("mlp.0.", "mlp.fc1."), ("mlp.3.", "mlp.fc2."), ("", ""))), *(
    (f"features.{2 * stage}.", f"layers.{stage}.downsample.") for stage in (1, 2, 3)))
# what timm's network has behind the convolutions and torchvision's trunk has not, or has otherwise
_IDENTITY, _FLAT = "torch.nn.Identity()", "torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(7), torch.nn.Flatten())"
EDITS: dict[str, dict[str, str]] = {
    **dict.fromkeys(("mobilenet_v3_large", "mobilenet_v3_small"), dict.fromkeys(
        ("conv_head", "norm_head", "act2"), _IDENTITY)),
    **{name: {"pre_logits": _IDENTITY, "head": _FLAT} for name in IN_ORDER if name.startswith("vgg")}}


class Timm(Target):
    """A bare state dict under timm's names, for timm's network of the same shape."""

    what = "a state dict under timm's names"
    tolerance = 1e-5  # another implementation of attention
    packages = ("timm",)
    projector = ""

    def refuse(self, network: Network) -> str | None:
        """Refuses a network whose tensors no network of timm's has."""
        import timm

        spec = network.trunk.spec
        if is_own(spec.arch):
            return super().refuse(network)
        advice = f"choose --to {'torchvision, ' * (spec.arch not in ORIGINALS)}safetensors or onnx"
        if spec.stem != "imagenet":
            return f"its stem is {spec.stem}, but timm's networks have the imagenet stem; {advice}"
        if spec.arch in SWINS and spec.image_size % (least := _size(spec.arch)):
            return (f"its images are {spec.image_size} px wide, which timm's Swin pads in another way unless the width "
                    f"is a multiple of {least}; {advice}")
        name, options = self.model(network)
        if not timm.is_model(name):
            return f"timm has no network {name}; {advice}"
        theirs = self._theirs(network).state_dict()
        if spec.arch in IN_ORDER and [x.numel() for x in theirs.values()] != [
                x.numel() for x in in_timms_order(network.trunk.state_dict()).values()]:
            return f"timm's {name} has other tensors; {advice}"
        ours = self._state(network)
        if {k: v.shape for k, v in theirs.items()} != {k: v.shape for k, v in ours.items()}:
            other = sorted(theirs.keys() ^ ours.keys()) or [k for k in ours if ours[k].shape != theirs[k].shape]
            return f"timm's {name} has other tensors ({other[0]} and {len(other) - 1} more differ); {advice}"
        return None

    def model(self, network: Network) -> tuple[str, dict[str, Any]]:
        """timm's name, and the other arguments of its builder."""
        import timm

        spec, trunk = network.trunk.spec, network.trunk
        if spec.arch.startswith(TIMM):
            return timm_arguments(trunk)
        if spec.arch in IN_ORDER:
            return IN_ORDER[spec.arch]
        if spec.arch in SWINS:
            name, options = SWINS[spec.arch]
            return name, {**options, **({"img_size": spec.image_size} if spec.image_size != _size(spec.arch) else {})}
        if spec.arch in EFFICIENTNETS:
            return f"tf_{name_there(spec.arch)}", {}
        if not isinstance(trunk, VisionTransformer) or trunk.hidden_dim not in VIT_WIDTHS:
            return spec.arch, {}
        word, heads = VIT_WIDTHS[trunk.hidden_dim]
        name = f"vit_{word}_patch{trunk.patch_size}_224"
        usual = timm.is_model(name)
        name = name if usual else f"vit_{word}_patch16_224"
        found = trunk.encoder.layers[0].num_heads
        return name, {**({} if spec.image_size == 224 else {"img_size": spec.image_size}),
                      **({} if usual else {"patch_size": trunk.patch_size}),
                      **({} if found == heads else {"num_heads": found})}

    def write(self, network: Network, path: Path) -> None:
        """Write the state dict under timm's names."""
        torch.save(self._state(network), path)

    def code(self, network: Network, path: Path) -> str:
        """timm's own loading."""
        name, options = self.model(network)
        if network.trunk.spec.arch in {**IN_ORDER, **SWINS}:
            return "; ".join(["import torch, timm", f"model = {timm_call(name, options)}", *self._edits(network),
                              f"model.load_state_dict({self.read_code(path)})", "model.eval()"])
        call, edits = timm_call(name, options, checkpoint_path=str(path)), feature_edit(network.trunk, "timm")
        return "; ".join([f"import {'torch, ' * bool(edits)}timm", f"model = {call}", "model.eval()", *edits])

    def _theirs(self, network: Network) -> nn.Module:
        """timm's network, without weights."""
        name, options = self.model(network)
        return run_code("; ".join(["import torch, timm", f"model = {timm_call(name, options)}", *self._edits(network)]),
                        "model")

    def _edits(self, network: Network) -> list[str]:
        """Statements that make timm's network end as torchvision's trunk does."""
        return [f"model.{part} = {module}" for part, module in EDITS.get(network.trunk.spec.arch, {}).items()]

    def _state(self, network: Network) -> dict[str, Tensor]:
        if network.trunk.spec.arch in IN_ORDER:
            ours, theirs = in_timms_order(network.trunk.state_dict()), self._theirs(network).state_dict()
            return {name: value.reshape(like.shape) for (name, like), value in zip(theirs.items(), ours.values(),
                                                                                   strict=True)}
        if network.trunk.spec.arch in EFFICIENTNETS:
            tensors = network.trunk.state_dict()
            table = efficientnet_names({name: value.shape for name, value in tensors.items()})
            return {table[name]: value for name, value in tensors.items()}
        if network.trunk.spec.arch in SWINS:
            return swin_state(network.trunk.state_dict())
        is_vit = isinstance(network.trunk, VisionTransformer)
        return {rename(name, "timm ViT" if is_vit else None, inverse=True): value
                for name, value in network.trunk.state_dict().items()}


def _size(arch: str) -> int:
    return int(SWINS[arch][0].rpartition("_")[2])


def swin_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of torchvision's Swin, V1 or V2, under timm's names, without the tables that timm computes. In V2
    timm has no bias of the keys, which torchvision sets to zero in each pass."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        theirs, attention = substitute(name, compile_rules(SWIN_NAMES)), name.removesuffix("qkv.bias")
        if attention != name and f"{attention}logit_scale" in tensors:
            query, _, values = value.chunk(3)
            found |= {theirs.replace("qkv.", "q_"): query, theirs.replace("qkv.", "v_"): values}
        elif not name.endswith((".relative_position_index", ".relative_coords_table")):
            found[theirs] = value
    return found


def in_timms_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's state dict in the order of timm's."""
    first: dict[str, int] = {}

    def place(numbered: tuple[int, str]) -> tuple[int, bool, int]:
        number, name = numbered
        found = LAST.match(name)
        return (first.setdefault(found["block"], number), found["last"] is not None, number) if found else (
            number, False, number)
    return {name: tensors[name] for _, name in sorted(enumerate(tensors), key=place)}
