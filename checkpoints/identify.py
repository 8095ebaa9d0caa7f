"""Identifying the architecture that a set of tensor names and shapes belongs to, or the nearest one."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Size, nn

from checkpoints.report import differences
from models.backbones import TIMM, Spec, WithoutStorage, arch_names, assemble, known_arch

# The auxiliary classifiers of GoogLeNet and Inception, and the tokens that replace masked patches in training.
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.", "mask_token", "masked_embed")
COUNTER = ".num_batches_tracked"  # not a weight, and missing from older and converted files
Shapes = Mapping[str, Size]

FAMILIES = (  # if a name like this is present, only these architectures can fit
    (r"layer1\.", r"resnet|resnext|wide_resnet"), (r"downsample_layers\.", r"convnext"), (r"patch_embed\.", r"vit_"),
    (r"class_token$", r"vit_"), (r"stage2\.", r"shufflenet"),
    (r"trunk_output\.", r"regnet"), (r"features\.denseblock1", r"densenet"), (r"inception3a", r"googlenet"),
    (r"Mixed_5b", r"inception"), (r"blocks\.0\.layers", r"maxvit"), (r"layers\.0\.weight", r"mnasnet"),
    (r"_conv_stem\.", r"efficientnet_b\d_coss"), (r"features\.1\.conv\.0\.weight", r"mobilenetv3"),
    (r"features\.0\.0\.", r"mobilenet_|efficientnet|convnext|swin"), (r"features\.", r"alexnet|vgg|squeezenet"))

NEAR_MISSES = (  # a name, and the network that has it; "…" means that timm has the network, if its name is given
    (r"blocks\.(\d+\.)+ls1\.gamma$", "a transformer with LayerScale (as DINOv2's), which torchvision's ViT has not…"),
    (r"patch_embed\.proj\.\d+\.", "a transformer with a convolutional stem (MoCo v3's vit_conv), which torchvision's "
     "ViT has not"),
    (r"dist_token$", "a distilled transformer with two class tokens, which torchvision's ViT has not…"),
    (r"(visual\.)?conv3\.weight$", "a ResNet with a stem of three convolutions (CLIP's), which torchvision has not"),
    (r"(visual\.)?(class_embedding$|transformer\.resblocks)", "the image half of CLIP or of a network like it, whose "
     "transformer torchvision has not…"),
    (r"conv1\.0\.weight$", "a ResNet with a stem of three convolutions (ResNet-C and -D), which torchvision has not…"),
    (r"_conv_stem\.weight$", "an EfficientNet of the package efficientnet_pytorch (SEED's) that is none of B0 to B8, "
     "L2 and Lite0 to Lite4"),
    (r"conv_stem\.weight$", "a mobile network under timm's names…"),
    (r".*/", "a network of JAX's (Haiku names); convert it to PyTorch first"))
NAME_IT = "; use timm's own network with --arch timm:NAME"


@dataclass
class Fit:
    """How the names and shapes in a file fit a trunk: the keys that match, are missing, are unexpected, or differ in
    shape."""

    found: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether the file has a tensor of the right shape for every key of the trunk, and no unexpected keys."""
        return not (self.missing or self.unexpected or self.reshaped)

    def difference(self) -> str:
        """The keys that do not fit, in words."""
        return differences(self.missing, self.unexpected, self.reshaped)


@dataclass(frozen=True)
class Identity:
    """Arguments of :func:`models.backbones.build_backbone`."""

    arch: str
    stem: str
    image_size: int


def fit(shapes: Shapes, wanted: Shapes, spec: Spec, heads: tuple[str, ...] = ()) -> Fit:
    """Compare ``shapes`` (of a file, under the trunk's names) with ``wanted`` (of a trunk's state dict). ``heads`` are
    prefixes of heads other than the architecture's own classifier."""
    result = Fit()
    for name, shape in shapes.items():
        if name in wanted:
            (result.found if shape == wanted[name] else result.reshaped).append(name)
        elif name.startswith((spec.head_name + ".", *AUXILIARY, *heads)):
            result.head.append(name)
        elif not name.endswith(COUNTER):
            result.unexpected.append(name)
    result.missing = [name for name in wanted if name not in shapes and not name.endswith(COUNTER)]
    return result


def identify(shapes: Shapes, first: Iterable[str] = (), image_size: int | None = None) -> list[Identity]:
    """All architectures that ``shapes`` fit exactly, those named in ``first`` before others of the same family.

    Architectures that differ only in their number of heads (``vit_s_16``, ``vit_s_16_12h``) are all returned.
    """
    size = transformer_image_size(shapes) or image_size or 224
    hints = [arch for arch in first if known_arch(arch)]
    found: list[Identity] = []
    for arch in dict.fromkeys([*hints, *candidates(shapes)]):
        if found and not arch.startswith("vit_"):  # only transformers can have equal shapes
            break
        for stem in ("imagenet", "cifar"):
            how = lay(shapes, Identity(arch, stem, size))
            if how is not None and how.exact:
                found.append(Identity(arch, stem, size))
            if how is None or how.exact or how.missing or how.unexpected or len(how.reshaped) > 1:
                break  # the other stem differs at most in the shape of one convolution
    return found


def lay(shapes: Shapes, identity: Identity) -> Fit | None:
    """:func:`fit` for a trunk that needs no memory; None if no such trunk can be built."""
    try:
        wanted, spec = trunk_shapes(identity)
    except Exception:  # noqa: BLE001 - a network that cannot be built for this size cannot be it
        return None
    return fit(shapes, wanted, spec)


def candidates(shapes: Shapes) -> list[str]:
    """The architectures of the family that the names suggest, or all if they suggest none."""
    for sign, archs in FAMILIES:
        if any(re.match(sign, name) for name in shapes):
            return [arch for arch in arch_names() if re.match(archs, arch)]
    return arch_names()


def has_family(shapes: Shapes) -> bool:
    """Whether the names belong to a known family."""
    return any(re.match(sign, name) for sign, _ in FAMILIES for name in shapes) or "cls_token" in shapes


def transformer_image_size(shapes: Shapes) -> int | None:
    """The side of the images, in pixels, that a ViT's position embeddings are for; None if that is unknown."""
    for patches, table in (("conv_proj.weight", "encoder.pos_embedding"), ("patch_embed.proj.weight", "pos_embed")):
        if {patches, table} <= shapes.keys() and len(shapes[table]) == 3:
            count = shapes[table][1]  # a square number of patches, plus class and register tokens
            sides = [math.isqrt(count - more) for more in range(6) if math.isqrt(max(0, count - more)) ** 2
                     == count - more]
            return shapes[patches][-1] * sides[0] if sides else None
    return None


def near_miss(shapes: Shapes, asked: str = "") -> str:
    """The most similar architecture, as the end of a sentence; ``asked`` is the one that --arch gave."""
    for sign, what in NEAR_MISSES:
        if any(re.match(sign, name) for name in shapes):
            advice = "; give another of timm's names" if asked.startswith(TIMM) else NAME_IT
            return f"it is {what.replace('…', advice)}"
    stem, width = shapes.get("conv1.weight", Size()), 64
    if "layer1.0.conv1.weight" in shapes and len(stem) == 4 and stem[0] != width and stem[0] % width == 0:
        return (f"it is a ResNet widened {stem[0] // width} times (its first convolution has {stem[0]} channels), "
                "which torchvision does not have (its wide_resnet widens only the inner layers)")
    fits = [(arch, how) for arch in candidates(shapes) if (how := lay(shapes, Identity(
        arch, "imagenet", transformer_image_size(shapes) or 224)))]
    if not fits or not (best := max(fits, key=lambda x: len(x[1].found) - len(x[1].missing)))[1].found:
        return "torchvision has no similar network"
    return f"nearest is {best[0]}, with {best[1].difference()}"


@functools.cache
def trunk_shapes(identity: Identity) -> tuple[dict[str, Size], Spec]:
    """Names and shapes of a trunk's state dict, and its Spec, without allocating memory."""
    model = hollow_trunk(identity)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}, model.spec


def hollow_trunk(identity: Identity) -> nn.Module:
    """A trunk on the meta device, without memory for its weights."""
    with torch.random.fork_rng(devices=[]), WithoutStorage():
        return assemble(identity.arch, identity.stem, identity.image_size)
