"""Lines of Python that rebuild one of our trunks with only its library, for users of an exported file.

An export is checked by running exactly the line that is printed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from models.backbones import TIMM, Spec, builder_options
from models.original import ORIGINALS
from models.tokens import ChosenFeature
from models.vit import VITS, vit_options
from runtime.own import is_own


def trunk_code(backbone: nn.Module) -> str:
    """``import …; model = …``, then statements that turn the library's network into the trunk: they remove the head and
    change the stem if it differs."""
    spec: Spec = backbone.spec
    if is_own(spec.arch):
        file, _, name = spec.arch.rpartition(":")
        pooled = ["model.register_forward_hook(lambda module, images, y: y.mean((2, 3)))"] * backbone.pools
        return "; ".join(["import runpy, torch", f"model = runpy.run_path({file!r})[{name!r}]()", *pooled])
    library = "timm" if spec.arch.startswith(TIMM) else "torchvision"
    if library == "timm":
        call = timm_call(*timm_arguments(backbone))
    elif spec.arch in VITS:
        call = f"torchvision.models.VisionTransformer({_written(vit_options(spec.arch, spec.image_size))})"
    elif spec.arch in ORIGINALS:
        library, call = "models.original", f"models.original.build_original({spec.arch!r})"
    else:
        options = _written(builder_options(spec.arch, spec.image_size))
        call = f"torchvision.models.get_model({', '.join(filter(None, (repr(spec.arch), options)))})"
    whole = run_code(f"import {library}; model = {call}", "model")
    head = [] if library == "timm" else [_head_edit(whole, backbone)]
    return "; ".join([f"import torch, {library}", f"model = {call}", *_stem_edits(whole, backbone), *head,
                      *feature_edit(backbone, library)])


def feature_edit(backbone: nn.Module, library: str) -> list[str]:
    """The statement that makes ``library``'s transformer return the chosen feature; none if it does so anyway."""
    if not isinstance(backbone, ChosenFeature):
        return []
    tokens, prefix = "model.forward_features(x)", getattr(backbone, "num_prefix_tokens", 1)
    if library == "torchvision":
        tokens = "model.encoder(torch.cat([model.class_token.expand(len(x), -1, -1), model._process_input(x)], 1))"
    norm = "model.fc_norm({})" if hasattr(backbone, "fc_norm") else "{}"
    parts = {"cls": norm.format("t[:, 0]"), "mean": norm.format(f"t[:, {prefix}:].mean(1)")}
    feature = ", ".join(parts[part] for part in backbone.spec.feature.split("+"))
    return [f"model.forward = lambda x: (lambda t: torch.cat([{feature}], 1))({tokens})"]


def head_code(head: nn.Sequential) -> str:
    """``projector = torch.nn.Sequential(…)``."""
    return f"projector = {_module(head)}"


def timm_call(name: str, options: dict[str, Any], **more: Any) -> str:
    """``timm.create_model(…)`` without a classifier."""
    return f"timm.create_model({name!r}, {_written({'num_classes': 0, **options, **more})})"


def timm_arguments(backbone: nn.Module) -> tuple[str, dict[str, Any]]:
    """timm's name of one of its networks, and the other arguments of its builder; convolutional networks take no image
    size."""
    import timm

    name, head = backbone.spec.arch.removeprefix(TIMM), getattr(backbone, "head", None)
    options = {"img_size": backbone.spec.image_size}
    if isinstance(head, nn.Linear):  # CLIP's projection
        options["num_classes"] = head.out_features
    try:
        timm.create_model(name, **{"num_classes": 0, **options})
    except TypeError:
        return name, {}
    return name, options


def run_code(code: str, wanted: str) -> Any:
    """Run a line made here, which checks that it works; returns the value of its variable ``wanted``."""
    scope: dict[str, Any] = {}
    exec(code, scope)
    return scope[wanted]


def _stem_edits(whole: nn.Module, trunk: nn.Module) -> list[str]:
    """Statements that replace those of the library's layers, except the head, that differ from the trunk's."""
    head_name, edits = trunk.spec.head_name, []
    for name, module in trunk.named_modules():
        if name == head_name or name.startswith(head_name + ".") or any(True for _ in module.children()):
            continue
        old = whole.get_submodule(name)
        if repr(old) != repr(module) and not isinstance(old, nn.Dropout):  # dropout does nothing in evaluation
            edits.append(f"model.set_submodule({name!r}, {_module(module)})" if "." in name
                         else f"model.{name} = {_module(module)}")
    return edits


def _head_edit(whole: nn.Module, trunk: nn.Module) -> str:
    """The statement that removes torchvision's classifier."""
    name = trunk.spec.head_name
    head, old = trunk.get_submodule(name), whole.get_submodule(name)
    kept = len(head) if isinstance(head, nn.Sequential) else 0
    if kept and [repr(x) for x in head] == [repr(x) for x in old[:kept]]:
        return f"model.{name} = model.{name}[:{kept}]"
    return f"model.{name} = {_module(head)}"


def _module(module: nn.Module) -> str:
    if isinstance(module, nn.Sequential):
        return f"torch.nn.Sequential({', '.join(map(_module, module))})"
    return f"torch.nn.{module!r}"


def _written(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
