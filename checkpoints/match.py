"""Laying one branch of a checkpoint file over a trunk, strictly both ways."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn

from checkpoints.authors import to_authors
from checkpoints.identify import (
    Fit,
    Identity,
    difference,
    fit,
    has_family,
    hollow_trunk,
    identify,
    near_miss,
    transformer_image_size,
)
from checkpoints.report import Report, few
from checkpoints.safe_load import file_sha256
from checkpoints.timm_names import OPENAI, POSITIONS, timm_candidates, told_apart
from checkpoints.translation import Translation, translate, without_numbers
from checkpoints.translation import image_size as native_size
from checkpoints.values import refuse_unsound, sentence, trouble
from models.backbones import TIMM, known_arch, require_timm
from models.heads import head_from
from models.original import name_there
from models.teachers import IMAGENET_MEAN, IMAGENET_STD
from models.tokens import FEATURES, evaluated_size, fitted_positions, position_table
from models.vit import VITS, attention_heads
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
    authors: str = ""  # the prefix that timm's converter knows the branch by


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
    meta: dict[str, Any]  # where the file records them: arch, stem, image_size, feature, epoch, mean, std, teacher,
    # hidden_act, heads
    files: tuple[Path, ...] = ()  # that hold the tensors, where ``path`` is a folder

    def identify(self, arch: str | None = None, stem: str | None = None, image_size: int | None = None, *,
                 arch_flag: str = "--arch", stem_flag: str = "--stem") -> Identity:
        """Which trunk to build; None is determined from the file. Raises :class:`UserError` if no architecture fits."""
        recorded = self.meta.get("stem")
        if stem and recorded and stem != recorded:  # the shapes alone would not tell for every architecture
            raise UserError(f"{stem_flag} {stem} contradicts {self.path}, which was trained with the {recorded} stem; "
                            "leave the flag out")
        if arch is None and self._recorded() and self._recorded()[0].startswith(TIMM):
            arch = self._recorded()[0]  # its names alone may fit a network of torchvision's as well
        if arch is None:
            found = self._fitting(image_size)
            if not found:
                elsewhere, see = self._elsewhere(), f"; give {arch_flag} to see the difference from that one"
                raise UserError(f"{self.flag} {self.path} ({self.layout.name} layout) fits no architecture known here: "
                                + (elsewhere.replace("--branch", arch_flag.replace("arch", "branch")) if elsewhere
                                   else self._near_miss() + see))
            hinted = [x for x in found if x.arch in self._hints()]
            best = (hinted or found)[0]
            if len(found) > 1 and best.arch.startswith(TIMM):
                raise UserError(f"{self.flag} {self.path} ({self.layout.name} layout) fits "
                                f"{', '.join(x.arch for x in found)}, which no name or shape tells apart (they differ "
                                f"in activation or normalisation); give {arch_flag} with the one that it is")
        else:
            best = Identity(arch, self._stem_of(self._shapes), self._native_size(arch) or 0)
        stem = stem or recorded or (self.layout.cifar_stem if best.stem != "imagenet" else "imagenet")
        size = image_size or self.meta.get("image_size") or evaluated_size(best.arch) or self._native_size(
            best.arch) or (224 if stem == "imagenet" else 32)
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
        """SHA-256 of the file, read once; of a folder that of its weights."""
        return file_sha256(*(self.files or (self.path,)))

    def match(self, backbone: nn.Module) -> tuple[Report, dict[str, Tensor]]:
        """The report of laying this file over ``backbone``, with ``error`` set if it does not fit, and the tensors
        that do, under the trunk's names. Nothing is loaded."""
        spec = backbone.spec
        inside, dropped, strays = self._sorted()
        laid, how, resampled = self._lay(backbone, inside)
        raw = {name: [self.prefix + x for x in made] or [name] for name, made in laid.sources.items()}
        for name in how.head:
            place = next((p for p in self._dropped_prefixes() if raw[name][0].startswith(p)), None)
            place = place or self.prefix + name.partition(".")[0] + "."
            dropped.setdefault(place, [0, "head"])[0] += max(1, len(laid.sources[name]))
        for name in laid.left_out:
            place = self.prefix + re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            dropped.setdefault(place, [0, "left out by timm's converter"])[0] += 1
        mean, std = self.layout.own.get(spec.arch, (self.layout.mean, self.layout.std))
        wanted = backbone.state_dict()
        report = Report(
            file=str(self.path), sha256=self.sha256, layout=self.layout.name, arch=spec.arch, stem=spec.stem,
            image_size=spec.image_size, feature=spec.feature, container=self.container, branch=self.prefix.rstrip("."),
            branches=[p.rstrip(".") for p in self.branches() if p != self.prefix], matched=len(how.found),
            missing=how.missing, unexpected=[raw[n][0] if n in raw else n for n in how.unexpected] + strays,
            reshaped=[f"{n} {list(laid.shapes[n])} for {list(wanted[n].shape)}" for n in how.reshaped],
            dropped={k: n for k, (n, _) in dropped.items()}, reasons={k: why for k, (_, why) in dropped.items()},
            epoch=self.meta.get("epoch"), recorded_arch=self.meta.get("arch"),
            mean=list(self.meta.get("mean") or _timm_colours(backbone, "mean") or mean),
            std=list(self.meta.get("std") or _timm_colours(backbone, "std") or std))
        report.notes = resampled + laid.notes(inside) + self._notes(spec.arch)
        heads, recorded = attention_heads(backbone), self.meta.get("heads")
        if report.missing or report.unexpected or report.reshaped:
            report.error = self._mismatch(report)
        elif heads and recorded and heads != recorded:
            report.error = (f"{self.path} is of a transformer with {recorded} heads, as its config.json says, and "
                            f"{spec.arch} has {heads}; give another --arch, or leave it out")
        else:
            report.error = self._unsound({x: (name, wanted[name].dtype) for name in how.found for x in raw[name]})
        return report, {name: laid.tensors[name] for name in how.found}

    def _lay(self, backbone: nn.Module, inside: Mapping[str, Tensor]) -> tuple[Translation, Fit, list[str]]:
        """The branch's tensors ``inside`` under the names of ``backbone``, how they fit, and what of positions was
        resampled, in words."""
        arch, stem = backbone.spec.arch, backbone.spec.stem
        try:
            laid = translate(inside, self.layout.authors, backbone if arch.startswith(TIMM) else None)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - timm's converters fail in any way on files that are not theirs
            raise UserError(f"{self.flag} {self.path} ({self.layout.name} layout) does not fit {arch}: "
                            f"timm's converter for its files fails ({type(error).__name__}: "
                            f"{' '.join(str(error).split())[:100]}); {self._advice(arch, stem)}") from None
        wanted = {name: value.shape for name, value in backbone.state_dict().items()}
        resampled = self._fit_positions(laid.tensors, backbone)
        how = fit(laid.shapes, wanted, backbone.spec, self._local_heads())
        resized = [n for n in laid.resized(inside) if n in how.found and not n.endswith(POSITIONS)]
        how.found = [name for name in how.found if name not in resized]
        how.reshaped += resized
        biases = re.compile(r"(.*\.)?(blocks|layers?)\.\d+\..*bias$")
        lost = [self.prefix + name for name in laid.left_out if biases.match(name)]
        how.unexpected += [name for name in lost if bool(self.tensors[name].count_nonzero())]  # zeros have no effect
        return laid, how, resampled

    def _fit_positions(self, tensors: dict[str, Tensor], backbone: nn.Module) -> list[str]:
        """Resample a transformer's positions to ``backbone``'s image size; what was done, in words."""
        name, prefix = position_table(backbone) or ("", 0)
        fitted = fitted_positions(tensors[name], backbone.state_dict()[name], prefix) if name in tensors else None
        if fitted is None:
            return []
        tensors[name] = fitted[0]
        return [fitted[1]]

    def _unsound(self, found: Mapping[str, tuple[str, torch.dtype]]) -> str | None:
        """A sentence on the first tensor of the file whose numbers cannot be the trunk's; None if there is none.
        ``found``: its name -> the trunk's, and the type that it takes there."""
        troubles = ((raw, trouble(name, self.tensors[raw], wanted)) for raw, (name, wanted) in found.items()
                    if raw in self.tensors)
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

    def _sorted(self) -> tuple[dict[str, Tensor], dict[str, list[Any]], list[str]]:
        """The branch's tensors without its prefix, other tensors by prefix, and unexpected ones."""
        inside: dict[str, Tensor] = {}
        dropped: dict[str, list[Any]] = {k + ".": [n, "outside the weights"] for k, n in self.outside.items()}
        strays = []
        for key, value in self.tensors.items():
            if key.startswith(self.prefix):
                inside[key[len(self.prefix):]] = value
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

    @functools.cached_property
    def _hollow(self) -> dict[str, Tensor]:
        """The branch's tensors, but for its heads, without their numbers."""
        heads = self._local_heads()
        return without_numbers({k: v for k, v in self._sorted()[0].items() if not k.startswith(heads)})

    @functools.cached_property
    def _shapes(self) -> dict[str, Size]:
        """The branch's under the names of torchvision's networks and ours, where it can be one."""
        return translate(self._hollow, "", None).shapes

    def _native_size(self, arch: str) -> int | None:
        """The image size, in pixels, that the file's position table is for."""
        if not arch.startswith(TIMM):
            return transformer_image_size(self._shapes)
        return native_size({k: v.shape for k, v in to_authors(self._hollow).items()})

    def _fitting(self, image_size: int | None) -> list[Identity]:
        """The architectures that the trunk fills exactly: torchvision's and our own before timm's."""
        found = identify(self._shapes, self._hints(), image_size or self.meta.get("image_size")) or [
            identity for identity, how in self._in_timm() if how.exact]
        act = self.meta.get("hidden_act", "quick_gelu" if self.tensors.keys() >= OPENAI else None)
        kept = told_apart([x.arch for x in found], act, "mean" in self.meta)
        heads = self.meta.get("heads")
        return [x for x in found if x.arch in kept and heads in (None, attention_heads(hollow_trunk(x)))]

    def _in_timm(self) -> list[tuple[Identity, Fit]]:
        """Those of timm's networks whose authors' files look so, and how the trunk fits them."""
        authors = {self.layout.authors + k: v.shape for k, v in to_authors(self._hollow).items()}
        found = []
        for arch in timm_candidates(authors):
            require_timm(f"{self.flag} {self.path} holds a network that is timm's here")
            identity = Identity(arch, "imagenet", evaluated_size(arch) or native_size(authors) or 224)
            try:
                found.append((identity, self._lay(hollow_trunk(identity), self._hollow)[1]))
            except Exception:  # noqa: BLE001 - a network that cannot be built so, or whose converter fails, cannot be it
                continue
        return found

    def _prefixes(self) -> list[tuple[str, str]]:
        """Other prefixes behind which a whole trunk lies, with its architecture; what is elsewhere is left aside."""
        keys = [name.split(".") for name, value in self.tensors.items() if value.ndim == 4]
        several = {".".join(key[:n]) + "." for key in keys for n in range(1, len(key) - 1)} - set(self.branches())
        found = []
        for prefix in sorted(several):
            inside = {k[len(prefix):]: v.shape for k, v in self.tensors.items() if k.startswith(prefix)}
            if has_family(inside):
                fits = dataclasses.replace(self, prefix=prefix, layout=Layout("", prefix, ""))._fitting(None)
                found += [(prefix.rstrip("."), fits[0].arch)] if fits else []
        return found

    def _elsewhere(self) -> str:
        """Where else in the file a trunk lies, as the end of a sentence; nothing where there is none."""
        inside = self._prefixes()
        several = ", ".join(f"{prefix} ({arch})" for prefix, arch in inside)
        return inside and f"a whole network lies under {several}; give --branch {inside[0][0]}" + (
            " or another of these" if len(inside) > 1 else "") or ""

    def _near_miss(self, asked: str = "") -> str:
        """What the trunk resembles, as the end of a sentence; ``asked`` is the architecture that was given."""
        others = [(x.arch, how) for x, how in self._in_timm() if x.arch != asked and how.found]
        if not others:
            return near_miss(self._shapes, asked)
        arch, how = max(others, key=lambda x: len(x[1].found) - len(x[1].missing) - len(x[1].unexpected))
        return f"nearest is {arch}, of which {difference(how)}"

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
        return (f"{self.path} ({report.layout} layout) does not fit {report.arch} with stem '{report.stem}'"
                f"{says}: trunk tensors {', '.join(findings)}; {self._advice(report.arch, report.stem)}")

    def _advice(self, arch: str, stem: str) -> str:
        """What to do where the file does not fit the architecture that was given, as the end of a sentence."""
        fits = self._fitting(None)
        if not fits:
            return self._near_miss(arch)
        if any(x.arch.partition(".")[0] == arch.partition(".")[0] and x.stem == stem for x in fits):
            return "its trunk fits, so save that alone, without what is left over, and give that"
        return f"it fits {fits[0].arch} with stem '{fits[0].stem}', so give that"


def has_convolution(tensors: dict[str, Tensor], prefix: str) -> bool:
    """Whether ``prefix`` leads to a trunk of convolutions or patches, which RADIO embeds by a matrix."""
    return any(value.ndim == 4 and name.startswith(prefix) for name, value in tensors.items()) or (
        f"{prefix}model.patch_generator.embedder.weight" in tensors)


def _timm_colours(backbone: nn.Module, name: str) -> Colours | None:
    return getattr(backbone, "pretrained_cfg", {}).get(name) if backbone.spec.arch.startswith(TIMM) else None
