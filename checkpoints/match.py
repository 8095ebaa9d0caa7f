"""Laying one branch of a checkpoint file over a trunk, strictly both ways."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Size, Tensor, nn

from checkpoints.identify import Identity, fit, identify, near_miss, timm_candidates, transformer_image_size
from checkpoints.naming import EFFICIENTNET, translation
from checkpoints.report import Report, few
from checkpoints.safe_load import file_sha256
from checkpoints.values import refuse_unsound, sentence, trouble
from models.backbones import TIMM, known_arch, require_timm
from models.heads import head_from
from models.original import name_there
from models.teachers import IMAGENET_MEAN, IMAGENET_STD
from models.tokens import FEATURES, evaluated_size, fitted_positions, position_table
from models.vit import VITS
from runtime.errors import UserError

Colours = Sequence[float]


@dataclass(frozen=True)
class Layout:
    """One way to lay a trunk in a file, after the container is opened and the wrappers are stripped.

    ``prefix`` stands before the trunk's keys in the branch that the method's own evaluation uses, ``branches`` before
    other trunks that may lie beside it. ``head`` are prefixes of the head, ``*`` standing for the branch's;
    ``dropped`` of what belongs to neither. All are anchored at a key's start. A file has the first layout of the
    table whose ``signs`` are all there (one is enough of those with ``|`` between them) and which has convolutions
    behind its prefix. ``mean`` and ``std`` are what the network was trained with, of images in [0, 1].
    """

    name: str
    prefix: str
    reads: str
    head: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()
    mean: Colours = IMAGENET_MEAN
    std: Colours = IMAGENET_STD
    cifar_stem: str = "cifar"
    archs: Mapping[str, str] = field(default_factory=dict)  # names that its files record -> ours
    own: Mapping[str, tuple[Colours, Colours]] = field(default_factory=dict)  # mean and std of single architectures


@dataclass(frozen=True)
class Checkpoint:
    """A file read safely: its layout, the tensors of its container without wrappers, and what it says of itself."""

    path: Path
    flag: str
    layout: Layout
    container: str
    prefix: str  # of the branch that is taken
    tensors: dict[str, Tensor]
    outside: dict[str, int]  # other prefixes in the file, with their numbers of tensors
    meta: dict[str, Any]  # arch, stem, image_size, feature, epoch, mean, std, teacher, where the file records them

    def identify(self, arch: str | None = None, stem: str | None = None, image_size: int | None = None, *,
                 arch_flag: str = "--arch", stem_flag: str = "--stem") -> Identity:
        """Which trunk to build; None is determined from the file. Raises :class:`UserError` if no architecture fits."""
        recorded = self.meta.get("stem")
        if stem and recorded and stem != recorded:  # the shapes alone would not tell for every architecture
            raise UserError(f"{stem_flag} {stem} contradicts {self.path}, which was trained with the {recorded} stem; "
                            "leave the flag out")
        if arch is None and self._recorded() and self._recorded()[0].startswith(TIMM):
            arch = self._recorded()[0]  # its names alone may fit a network of torchvision's as well
        shapes = self._trunk_shapes(arch)
        if arch is None:
            found = self._fitting(image_size)
            if not found:
                raise UserError(f"{self.flag} {self.path} ({self.layout.name} layout) fits no architecture known here: "
                                f"{near_miss(shapes)}; give {arch_flag} to see the difference from that one")
            hinted = [x for x in found if x.arch in self._hints()]
            best = (hinted or found)[0]
        else:
            best = Identity(arch, self._stem_of(shapes), transformer_image_size(shapes) or 0)
        stem = stem or recorded or (self.layout.cifar_stem if best.stem != "imagenet" else "imagenet")
        size = image_size or self.meta.get("image_size") or evaluated_size(best.arch) or transformer_image_size(
            shapes) or (224 if stem == "imagenet" else 32)
        return Identity(best.arch, stem, size)

    def feature(self, wanted: str = "auto") -> str:
        """What of a transformer is its feature: ``wanted``, or for ``auto`` what the file records, else ``auto``."""
        recorded = self.meta.get("feature", "auto")
        return recorded if wanted == "auto" and recorded in FEATURES else wanted

    def load_into(self, backbone: nn.Module) -> Report:
        """Fill ``backbone`` (see :func:`models.backbones.build_backbone`); raises unless the match is exact."""
        report, found = self.match(backbone)
        if report.error:
            raise UserError(report.error)
        wanted = backbone.state_dict()
        wanted.update((k, v.to(wanted[k].dtype)) for k, v in found.items())  # keeps its metadata, which MNASNet reads
        backbone.load_state_dict(wanted)
        return report

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, read once."""
        return file_sha256(self.path)

    def match(self, backbone: nn.Module) -> tuple[Report, dict[str, Tensor]]:
        """The report of laying this file over ``backbone``, with ``error`` set if it does not fit, and the tensors
        that do, under the trunk's names. Nothing is loaded."""
        spec = backbone.spec
        inside, dropped, strays = self._sorted(spec.arch)
        resampled = self._fit_positions(inside, backbone)
        shapes = {name: value.shape for name, (_, value) in inside.items()}
        how = fit(shapes, {k: v.shape for k, v in backbone.state_dict().items()}, spec, self._local_heads())
        for name in how.head:
            raw = inside[name][0]
            place = next((p for p in self._dropped_prefixes() if raw.startswith(p)), None)
            place = place or self.prefix + name.partition(".")[0] + "."
            dropped.setdefault(place, [0, "head"])[0] += 1
        mean, std = self.layout.own.get(spec.arch, (self.layout.mean, self.layout.std))
        report = Report(
            file=str(self.path), sha256=self.sha256, layout=self.layout.name, arch=spec.arch, stem=spec.stem,
            image_size=spec.image_size, feature=spec.feature, container=self.container, branch=self.prefix.rstrip("."),
            branches=[p.rstrip(".") for p in self.branches() if p != self.prefix], matched=len(how.found),
            missing=how.missing, unexpected=[inside[n][0] for n in how.unexpected] + strays,
            reshaped=[f"{n} {list(shapes[n])} for {list(backbone.state_dict()[n].shape)}" for n in how.reshaped],
            dropped={k: n for k, (n, _) in dropped.items()}, reasons={k: why for k, (_, why) in dropped.items()},
            epoch=self.meta.get("epoch"), recorded_arch=self.meta.get("arch"),
            mean=list(self.meta.get("mean") or _timm_colours(backbone, "mean") or mean),
            std=list(self.meta.get("std") or _timm_colours(backbone, "std") or std))
        report.notes = resampled + self._notes(spec.arch)
        if report.missing or report.unexpected or report.reshaped:
            report.error = self._mismatch(report)
        else:
            report.error = self._unsound(backbone, {inside[name][0]: (name, inside[name][1]) for name in how.found})
        return report, {name: inside[name][1] for name in how.found}

    def _fit_positions(self, inside: dict[str, tuple[str, Tensor]], backbone: nn.Module) -> list[str]:
        """Resample a transformer's positions to ``backbone``'s image size; what was done, in words."""
        name, prefix = position_table(backbone) or ("", 0)
        raw, table = inside.get(name, ("", None))
        fitted = None if table is None else fitted_positions(table, backbone.state_dict()[name], prefix)
        if fitted is None:
            return []
        inside[name] = raw, fitted[0]
        return [fitted[1]]

    def _unsound(self, backbone: nn.Module, found: Mapping[str, tuple[str, Tensor]]) -> str | None:
        """A sentence on the first tensor of the file whose numbers cannot be the trunk's; None if there is none."""
        wanted = backbone.state_dict()
        troubles = ((raw, trouble(name, value, wanted[name].dtype)) for raw, (name, value) in found.items())
        return next((sentence(str(self.path), raw, said) for raw, said in troubles if said), None)

    def _notes(self, arch: str) -> list[str]:
        notes = [f"it records {x}, but {arch} was taken" for x in self._recorded()
                 if known_arch(x) and x not in (arch, name_there(arch))]
        twins = [x for x in VITS if arch in VITS and x != arch and VITS[x][:2] == VITS[arch][:2]]
        return notes + [f"its tensors would fit {twin} too, which has another number of heads" for twin in twins]

    def branches(self) -> list[str]:
        """Prefixes of all trunks that the layout knows and this file holds, the default first."""
        return [p for p in (self.layout.prefix, *self.layout.branches) if has_convolution(self.tensors, p)]

    def head(self) -> nn.Sequential:
        """The branch's own head; raises :class:`UserError` if the file has none of a known kind."""
        for pattern in self.layout.head:
            if tensors := self._head_tensors(pattern):
                whose = f"{self.flag} {self.path}: the head {self._absolute(pattern)}*"
                head = head_from(tensors, whose)
                refuse_unsound(tensors, whose)
                return head
        return head_from({}, f"{self.flag} {self.path}")

    def heads(self) -> list[nn.Sequential]:
        """The branch's own heads of a known kind: one for each of the losses that trained a student, else one or none.
        """
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in next(filter(None, map(self._head_tensors, self.layout.head)), {}).items():
            first, _, rest = name.partition(".")
            several = bool(rest) and not first.isdigit()  # names of heads, not numbers of layers
            groups.setdefault(first if several else "", {})[rest if several else name] = value
        found = []
        for tensors in groups.values():
            try:
                head = head_from(tensors, str(self.path))
            except UserError:
                continue
            refuse_unsound(tensors, f"{self.path}: a head")
            found.append(head)
        return found

    def _head_tensors(self, pattern: str) -> dict[str, Tensor]:
        prefix = self._absolute(pattern)
        tensors = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
        while len({k.partition(".")[0] for k in tensors}) == 1 and all("." in k for k in tensors):
            tensors = {k.partition(".")[2]: v for k, v in tensors.items()}  # a head inside a head
        return tensors

    def _sorted(self, arch: str | None) -> tuple[dict[str, tuple[str, Tensor]], dict[str, list[Any]], list[str]]:
        """The branch's tensors (trunk's name -> raw name, tensor), other tensors by prefix, and unexpected ones."""
        shapes = {k[len(self.prefix):]: v.shape for k, v in self.tensors.items() if k.startswith(self.prefix)}
        translate = translation(shapes, to_timm=bool(arch and arch.startswith(TIMM)))
        inside: dict[str, tuple[str, Tensor]] = {}
        dropped: dict[str, list[Any]] = {k + ".": [n, "outside the weights"] for k, n in self.outside.items()}
        strays = []
        for key, value in self.tensors.items():
            if key.startswith(self.prefix):
                inside[translate(key[len(self.prefix):])] = key, value
            elif place := next((p for p in self._dropped_prefixes() if key.startswith(p)), None):
                why = ("another branch" if place in (self.layout.prefix, *self.layout.branches) else
                       "head" if place in map(self._absolute, self.layout.head) else "no part of the trunk")
                dropped.setdefault(place, [0, why])[0] += 1
            else:
                strays.append(key)
        return inside, dropped, strays

    def _dropped_prefixes(self) -> tuple[str, ...]:
        """Everything that a file may contain in addition to the branch, most specific first."""
        trunks = (p for p in (self.layout.prefix, *self.layout.branches) if p != self.prefix and p)
        return (*trunks, *map(self._absolute, self.layout.head), *self.layout.dropped)

    def _absolute(self, pattern: str) -> str:
        return self.prefix + pattern[1:] if pattern.startswith("*") else pattern

    def _local_heads(self) -> tuple[str, ...]:
        """Prefixes of the head after the branch's own prefix or, without one, of everything outside the trunk."""
        starred = tuple(p[1:] for p in self.layout.head if p.startswith("*"))
        # Names that a head may have, of which it has one: MobileNetV3's classifier. is of the trunk beside an fc.
        starred = next(((p,) for p in starred if any(k.startswith(self.prefix + p) for k in self.tensors)), starred)
        return starred if self.prefix else (*starred, *self.layout.head, *self.layout.dropped)

    def _trunk_shapes(self, arch: str | None) -> dict[str, Size]:
        inside, _, _ = self._sorted(arch)
        heads = self._local_heads()
        return {name: value.shape for name, (_, value) in inside.items() if not name.startswith(heads)}

    def _fitting(self, image_size: int | None) -> list[Identity]:
        """The architectures that the trunk fills exactly: torchvision's and our own before timm's."""
        shapes, size = self._trunk_shapes(None), image_size or self.meta.get("image_size")
        found = identify(shapes, self._hints(), size)
        if not found and EFFICIENTNET in shapes:
            require_timm(f"{self.flag} {self.path} holds one of efficientnet_pytorch's EfficientNets, which are "
                         "networks of timm's here")
            found = identify(self._trunk_shapes(TIMM), (), size, timm_candidates(shapes))
        return found

    def _recorded(self) -> list[str]:
        """The architecture that the file names, translated into ours."""
        arch = self.meta.get("arch")
        return [self.layout.archs.get(arch, arch)] if isinstance(arch, str) else []

    def _hints(self) -> list[str]:
        """Architectures to try first: the one recorded, or the layout's own."""
        return self._recorded() or (list(self.layout.archs.values()) if self.layout.prefix else [])

    def _stem_of(self, shapes: Mapping[str, Size]) -> str:
        """``cifar`` for a ResNet whose first convolution is 3x3; for others the shapes do not tell."""
        first = shapes.get("conv1.weight", Size())
        return "cifar" if "layer1.0.conv1.weight" in shapes and first[-1:] == (3,) and "conv3.weight" not in shapes \
            else "imagenet"

    def _mismatch(self, report: Report) -> str:
        arch = report.recorded_arch
        says = f"; the file says it holds {arch}" if arch and arch != report.arch else ""
        findings = [f"{len(keys)} {what} ({few(keys)})" for what, keys in (
            ("missing", report.missing), ("left over", report.unexpected),
            ("of another shape", report.reshaped)) if keys]
        trunk = self._trunk_shapes(report.arch)
        fits = self._fitting(report.image_size)
        if not fits:
            advice = near_miss(trunk)
        elif any((x.arch, x.stem) == (report.arch, report.stem) for x in fits):
            advice = "its trunk fits, so save that alone, without what is left over, and give that"
        else:
            advice = f"it fits {fits[0].arch} with stem '{fits[0].stem}', so give that"
        return (f"{self.path} ({report.layout} layout) does not fit {report.arch} with stem '{report.stem}'"
                f"{says}: trunk tensors {', '.join(findings)}; {advice}")


def has_convolution(tensors: dict[str, Tensor], prefix: str) -> bool:
    """Whether ``prefix`` leads to a trunk of convolutions or patches."""
    return any(value.ndim == 4 and name.startswith(prefix) for name, value in tensors.items())


def _timm_colours(backbone: nn.Module, name: str) -> Colours | None:
    return getattr(backbone, "pretrained_cfg", {}).get(name) if backbone.spec.arch.startswith(TIMM) else None
