"""Any torchvision or timm classifier as a feature extractor: without its head, and with a known feature width."""

from __future__ import annotations

import difflib
import importlib.machinery
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from models.original import ORIGINALS, build_original
from models.own import HEAD, build_own
from models.tokens import choose_feature, patch_of, refuse_split_patches, use_feature
from models.vit import VITS, build_vit
from runtime import first_pass
from runtime.errors import UserError, memory_that_ran_out
from runtime.own import OWN_HELP, is_own, load_own
from runtime.packages import need_package

STEMS = ("imagenet", "cifar", "cifar_pad2")  # cifar_pad2 is solo-learn's: a 3x3 convolution with padding 2
TIMM = "timm:"
ARCH_HELP = f"name of a torchvision classifier, {TIMM}NAME, or {OWN_HELP}"


@dataclass(frozen=True)
class Spec:
    """The description of a trunk. Checkpoints store ``record()``, which is enough to build the trunk again."""

    arch: str
    stem: str
    image_size: int  # only transformers require this size
    feature_dim: int
    head_name: str  # the child module that was the classifier
    feature: str = "pool"  # one of models.tokens.FEATURES except auto
    code_sha256: str = ""  # of the file of one's own network

    def __str__(self) -> str:
        feature = f", feature {self.feature}" if self.feature != "pool" else ""
        return f"{self.arch}, stem {self.stem}, {self.image_size} px{feature}"

    def record(self) -> dict[str, Any]:
        """``arch``, ``stem``, ``image_size``, ``feature``: the arguments of :func:`build_backbone`."""
        return {"arch": self.arch, "stem": self.stem, "image_size": self.image_size, "feature": self.feature}

    def identity(self) -> dict[str, Any]:
        """:meth:`record`, and for the user's own network the hash of its file, as checkpoints store them."""
        return {**self.record(), **({"code_sha256": self.code_sha256} if self.code_sha256 else {})}


def arch_names() -> list[str]:
    """The names of all torchvision classifiers, and of networks that torchvision has no builder for: small vision
    transformers, and the mobile networks of the original CoSS code."""
    found = _names_in_source() if first_pass.goes_on() else torchvision.models.list_models(module=torchvision.models)
    return [*found, *VITS, *ORIGINALS]


def _names_in_source() -> list[str]:
    """torchvision's classifiers by its source, which need not be imported for that."""
    library = importlib.machinery.PathFinder.find_spec("torchvision")
    files = Path(library.origin).parent.glob("models/*.py") if library else ()
    found = [name for file in files for name in re.findall(r"^@register_model\(\)\n.*?^def (\w+)",
                                                           file.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)]
    if not found:
        first_pass.need_libraries()
    return sorted(found)


def known_arch(arch: object) -> bool:
    """Whether this is the name of a library's network. FILE.py:NAME is not, so a checkpoint cannot make us run one;
    timm's names are not looked up."""
    return isinstance(arch, str) and (arch in arch_names() or arch.startswith(TIMM))


def check_arch(arch: str, flag: str) -> str:
    """``arch`` if it is known; of FILE.py:NAME the file is run. Raises :class:`UserError`, which names ``flag`` and
    similar names, if it is not."""
    if is_own(arch):
        return str(load_own(arch, flag))
    if known_arch(arch):
        return arch
    near = difflib.get_close_matches(arch, arch_names(), n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}? Otherwise give" if near else "give one of torchvision's names (resnet18),"
    raise UserError(f"{flag} {arch} is not a torchvision classifier; {hint} timm:NAME for one of timm's, or "
                    "FILE.py:NAME for a function of your own that returns the network (docs/CHECKPOINTS.md)")


def build_backbone(arch: str, stem: str = "imagenet", image_size: int = 224, feature: str = "auto",
                   flag: str = "--arch") -> nn.Module:
    """A freshly initialised trunk that maps images [b, 3, H, W] to pooled features [b, feature_dim].

    ``arch`` is a torchvision classifier, one of :data:`models.vit.VITS` or :data:`models.original.ORIGINALS`,
    ``timm:NAME``, or the user's own FILE.py:NAME (models.own). The parameters keep the library's names, but there is no
    head; ``.spec`` describes the trunk.

    ``stem="cifar"``, for images of about 32 pixels, makes the first convolution 3x3 with stride 1 and removes the
    max-pool after it, as MoCo and SimCLR do for CIFAR; ``cifar_pad2`` also pads it by 2, as solo-learn does.

    ``feature``: which tokens of a transformer are the feature, one of :data:`models.tokens.FEATURES`. ``flag``, which
    gave ``arch``, is for messages.
    """
    check_arch(arch, flag)
    model = assemble(arch, stem, image_size, feature, flag)
    _try_out(model, flag)
    return model


def assemble(arch: str, stem: str = "imagenet", image_size: int = 224, feature: str = "auto",
             flag: str = "--arch") -> nn.Module:
    """:func:`build_backbone` without the trial forward pass."""
    prefix = "--teacher-" if flag.startswith("--teacher") else "--"
    if stem not in STEMS:
        raise UserError(f"--stem {stem} is unknown; choose from {', '.join(STEMS)}")
    if is_own(arch):
        return _assemble_own(arch, stem, image_size, feature, flag, prefix)
    if arch.startswith(TIMM):
        model, head_name, width = _build_timm(arch, image_size, feature == "pool", flag)
        refuse_split_patches(arch, patch_of(model), image_size, f"{prefix}image-size")
    elif arch in ORIGINALS:
        model = build_original(arch)
        head_name, width = "fc", model.fc.in_features
        model.fc = nn.Identity()  # only the classifier: dropout before it stays during distillation, as in the original
    else:
        refuse_split_patches(arch, _patch_by_name(arch), image_size, f"{prefix}image-size")
        try:
            model = build_vit(arch, image_size) if arch in VITS else torchvision.models.get_model(
                arch, weights=None, **builder_options(arch, image_size))
        except (ValueError, AssertionError, RuntimeError) as error:
            raise UserError(f"{flag} {arch} cannot be built for --image-size {image_size}: "
                            f"{' '.join(str(error).split())}; give another size") from None
        head_name, width = _remove_head(model)
    if stem != "imagenet":
        _use_cifar_stem(model, arch, padding=2 if stem == "cifar_pad2" else 1)
    feature = choose_feature(model, arch, feature, f"{prefix}feature")
    model.spec = Spec(arch, stem, image_size, width * use_feature(model, feature), head_name, feature)
    return model


def _assemble_own(arch: str, stem: str, image_size: int, feature: str, flag: str, prefix: str) -> nn.Module:
    """A network of one's own, whose stem and feature are as its code has them."""
    own = load_own(arch, flag)
    for name, value, only in ((f"{prefix}stem", stem, "imagenet"), (f"{prefix}feature", feature, "pool")):
        if value not in (only, "auto"):
            raise own.error(f"has the stem and the feature that its code gives it, and {name} {value} changes neither",
                            f"leave {name} out")
    model, width = build_own(own, image_size)
    model.spec = Spec(str(own), stem, image_size, width, HEAD, "pool", own.sha256)
    return model


def _patch_by_name(arch: str) -> int | None:
    """The patch size of a transformer of torchvision or models.vit, which is the end of its name: vit_b_16."""
    return VITS[arch][0] if arch in VITS else int(arch.split("_")[2]) if arch.startswith("vit_") else None


class WithoutStorage(TorchFunctionMode):
    """Makes ``torch.empty``, by which layers allocate their weights, return tensors on the meta device, without
    memory."""

    def __torch_function__(self, func, types, positional=(), named=None):  # noqa: ANN001, ANN204
        return func(*positional, **{**(named or {}), **({"device": "meta"} if func is torch.empty else {})})


def timm_config(name: str, what: str) -> Any:
    """timm's configuration of its network ``name``, with or without a tag; None if it has none. Raises
    :class:`UserError`, which begins with ``what``, if timm does not know the name."""
    timm = need_package("timm", what)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=4)
        raise UserError(f"{what}: timm has no model {name}; "
                        + (f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"))
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:  # timm knows the network, but not the tag after its name
        arch = name.partition(".")[0]
        raise UserError(f"{what}: timm has no weights of that tag, only "
                        f"{', '.join(timm.list_models(f'{arch}.*', pretrained=True))}; give one of these, or only "
                        f"{arch}") from None


def _build_timm(arch: str, image_size: int, pooled: bool, flag: str) -> tuple[nn.Module, str, int]:
    """The network, the name of its head, and its feature width. ``pooled``: with CLIP's projection into the space that
    it shares with texts."""
    name = arch.removeprefix(TIMM)
    config = timm_config(name, f"{flag} {arch}")
    import timm

    projected = config.num_classes if pooled and "_clip_" in name and config and "_ft_" not in f"_{config.tag}" else 0
    try:
        model = timm.create_model(name, num_classes=projected, img_size=image_size)
    except TypeError:  # a convolutional network takes images of any size
        model = timm.create_model(name, num_classes=0)
        projected = 0
    head_name = model.pretrained_cfg.get("classifier") or "head"
    return model, head_name if isinstance(head_name, str) else head_name[0], projected or getattr(
        model, "head_hidden_size", model.num_features)  # MobileNetV3 and similar networks are wider after the pooling


@torch.no_grad()
def _try_out(model: nn.Module, flag: str) -> None:
    """Pass one image through the trunk. Raises :class:`UserError` if the image size does not suit the trunk, or if the
    features do not have the expected width."""
    spec = model.spec
    try:
        shape = model.eval()(torch.zeros(1, 3, spec.image_size, spec.image_size)).shape
    except (MemoryError, RuntimeError, ValueError, AssertionError) as error:
        if memory := memory_that_ran_out(error):
            raise UserError(f"{flag} {spec.arch} at --image-size {spec.image_size}: {memory}; give smaller images"
                            ) from None
        raise UserError(f"{flag} {spec.arch} does not work at --image-size {spec.image_size} "
                        f"({' '.join(str(error).split())[:120]}); give larger images or another architecture") from None
    if shape != (1, spec.feature_dim):
        raise UserError(f"{flag} {spec.arch} gives features of shape {list(shape)}, expected [1, {spec.feature_dim}]; "
                        "this architecture is not supported, so choose another")
    model.train()


def check_batch(module: nn.Module, images: int, flag: str = "--batch-size") -> None:
    """Raise :class:`UserError` for one image per process if the network has batch norm, which needs at least two."""
    if images < 2 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
        raise UserError(f"{flag} gives each process one image per step, but the network has batch norm, which needs at "
                        "least 2; raise it, or start fewer processes")


def attach_head(backbone: nn.Module, head: nn.Module) -> nn.Module:
    """Put ``head`` in the place of the classifier (MoCo's ``encoder.fc = MLP``); returns ``backbone``."""
    name = backbone.spec.head_name
    place = backbone.get_submodule(name)
    if isinstance(place, nn.Sequential):  # norm and flatten layers that belong to the trunk
        place.append(head)
    else:
        _replace(backbone, name, head)
    return backbone


def builder_options(arch: str, image_size: int) -> dict[str, Any]:
    """The arguments of a torchvision builder that matter for feature extraction."""
    parameters = inspect.signature(torchvision.models.get_model_builder(arch)).parameters
    options: dict[str, Any] = {}
    if arch.startswith("vit_"):
        options["image_size"] = image_size
    if arch.startswith("maxvit"):
        options["input_size"] = (image_size, image_size)
    if arch in ("googlenet", "inception_v3") or "aux_logits" in parameters:
        options |= {"aux_logits": False, "init_weights": True}
    return options


def _remove_head(model: nn.Module) -> tuple[str, int]:
    """Remove the classifier in place; returns the name of the child module that held it, and the classifier's input
    width.

    The head is the last child with parameters. Its first linear (in SqueezeNet, convolutional) layer and everything
    after that is removed, and dropout before it; norm and flatten layers before it stay (ConvNeXt, MaxViT).
    """
    name, head = [(n, c) for n, c in model.named_children() if any(True for _ in c.parameters())][-1]
    layers = list(head.children()) if isinstance(head, nn.Sequential) else [head]
    cut = next((i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear | nn.Conv2d)), None)
    if cut is None:
        raise UserError(f"--arch {type(model).__name__}: its last part '{name}' has no linear classifier, so its "
                        "features are unknown; choose another architecture")
    kept = [layer for layer in layers[:cut] if not isinstance(layer, nn.Dropout)]
    if isinstance(layers[cut], nn.Conv2d):
        kept += [nn.AdaptiveAvgPool2d(1), nn.Flatten(1)]
        width = layers[cut].in_channels
    else:
        width = layers[cut].in_features
    setattr(model, name, nn.Sequential(*kept) if kept else nn.Identity())
    for child_name, child in model.named_children():  # in GoogLeNet and Inception, dropout is beside the head
        if isinstance(child, nn.Dropout):
            setattr(model, child_name, nn.Identity())
    return name, width


def _use_cifar_stem(model: nn.Module, arch: str, padding: int) -> None:
    modules = list(model.named_modules())
    convs = [i for i, (_, m) in enumerate(modules) if isinstance(m, nn.Conv2d)]
    if not convs or modules[convs[0]][1].kernel_size == modules[convs[0]][1].stride:
        raise UserError(f"--stem cifar needs a convolutional stem, but {arch} cuts the image into patches; omit the "
                        "flag")
    name, old = modules[convs[0]]
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=padding, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    _replace(model, name, new)
    for pool_name, module in modules[:convs[1]]:
        if isinstance(module, nn.MaxPool2d):
            _replace(model, pool_name, nn.Identity())


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
