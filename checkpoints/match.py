"""Matching one branch of a checkpoint file with a trunk, strictly both ways: every tensor of the trunk must be filled,
and there may be no unexpected keys that could belong to a trunk. (ResNet-34 weights fill a ResNet-18 completely, so
filling alone proves nothing.)
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.identify import COUNTER, Identity, has_family
from checkpoints.layouts import Colours, Layout
from checkpoints.report import Report
from checkpoints.safe_load import file_sha256
from checkpoints.timm_names import OPENAI
from checkpoints.trunk import Trunk, has_convolution
from checkpoints.values import other_rotation, refuse_unsound, sentence, trouble
from models.backbones import TIMM, Spec, known_arch
from models.heads import head_from
from models.original import name_there
from models.tokens import FEATURES, evaluated_size
from models.vit import VITS, attention_heads
from runtime.errors import UserError
from runtime.own import is_own


@dataclass(frozen=True)
class Checkpoint:
    """A file read safely: its layout, the tensors of its container without wrappers, and what it records of itself."""

    path: Path
    flag: str
    layout: Layout
    container: str
    prefix: str  # of the selected branch
    tensors: dict[str, Tensor]
    outside: dict[str, int]  # prefixes of tensors outside the container, with the number of tensors
    meta: dict[str, Any]  # where the file records them: arch, stem, image_size, feature, epoch, mean, std, teacher,
    # hidden_act, heads, code_sha256
    files: tuple[Path, ...] = ()  # that hold the tensors, where ``path`` is a folder

    def identify(self, arch: str | None = None, stem: str | None = None, image_size: int | None = None, *,
                 arch_flag: str = "--arch", stem_flag: str = "--stem") -> Identity:
        """Which trunk to build. Arguments that are None are determined from the file. Raises :class:`UserError` if no
        architecture fits."""
        recorded = self.meta.get("stem")
        if stem and recorded and stem != recorded:  # the shapes alone would not tell for every architecture
            raise UserError(f"{stem_flag} {stem} contradicts {self.path}, which was trained with the {recorded} stem; "
                            "omit the flag")
        if arch is None and self._recorded() and self._recorded()[0].startswith(TIMM):
            arch = self._recorded()[0]  # its names alone may fit a network of torchvision's as well
        if arch is None and is_own(self.meta.get("arch")):
            raise UserError(f"{self.flag} {self.path} is a network of someone's own code, which is run only where a "
                            f"command line names it; look at the file and give {arch_flag} {self.meta['arch']}")
        if is_own(arch):
            return Identity(arch, "imagenet", image_size or self.meta.get("image_size") or 224)
        if arch is None:
            found = self.trunk.fitting(image_size)
            if not found:
                elsewhere, see = self._elsewhere(), f"; give {arch_flag} to see the difference from that one"
                raise UserError(f"{self.trunk.whose} fits no architecture known here: " + (
                    elsewhere.replace("--branch", arch_flag.replace("arch", "branch")) if elsewhere
                    else self.trunk.near_miss() + see))
            hinted = [x for x in found if x.arch in self._hints()]
            best = (hinted or found)[0]
            if len(found) > 1 and best.arch.startswith(TIMM):
                raise UserError(f"{self.trunk.whose} fits {', '.join(x.arch for x in found)}, which no name or shape "
                                f"tells apart (they differ in activation or normalisation); give {arch_flag} with the "
                                "one that it is")
        else:
            best = Identity(arch, self.trunk.stem(), self.trunk.native_size(arch) or 0)
        stem = stem or recorded or (self.layout.cifar_stem if best.stem != "imagenet" else "imagenet")
        size = image_size or self.meta.get("image_size") or evaluated_size(best.arch) or self.trunk.native_size(
            best.arch) or (224 if stem == "imagenet" else 32)
        return Identity(best.arch, stem, size)

    def over(self, backbone: nn.Module) -> Checkpoint:
        """The same file for ``backbone``: where that is one's own network, whose names no layout knows, the branch is
        the first prefix behind which all of its tensors are."""
        names = [name for name in backbone.state_dict() if not name.endswith(COUNTER)] if is_own(
            backbone.spec.arch) else []
        prefixes = [key.removesuffix(name) for name in names[:1] for key in self.tensors if key.endswith(name)]
        for prefix in prefixes:
            if all(prefix + name in self.tensors for name in names):
                others = dict.fromkeys(key.partition(".")[0] for key in self.tensors if not key.startswith(prefix))
                return dataclasses.replace(self, prefix=prefix, layout=dataclasses.replace(
                    self.layout, prefix=prefix, branches=(), dropped=tuple(others)))
        return self

    def feature(self, wanted: str = "auto") -> str:
        """Which tokens of a transformer are its feature: ``wanted``; if that is ``auto``, what the file records."""
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
        """SHA-256 of the file, or of the files with the weights of a folder; computed once."""
        return file_sha256(*(self.files or (self.path,)))

    def match(self, backbone: nn.Module) -> tuple[Report, dict[str, Tensor]]:
        """The report of matching this file with ``backbone``, with ``error`` set if it does not fit, and the matching
        tensors under the trunk's names. Nothing is loaded."""
        spec = backbone.spec
        inside, dropped, strays = self._sorted()
        laid, how, resampled = self.trunk.lay(backbone)
        raw = {name: [self._in_file(x) for x in made] or [name] for name, made in laid.sources.items()}
        for given in dict.fromkeys(x for name in how.head for x in raw[name]):
            place = next((p for p in self._dropped_prefixes() if given.startswith(p)), None)
            place = place or self.prefix + given.removeprefix(self.prefix).partition(".")[0] + "."
            dropped.setdefault(place, [0, "head"])[0] += 1
        for name in laid.left_out:
            place = self.prefix + re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            dropped.setdefault(place, [0, "left out by timm's converter"])[0] += 1
        mean, std = self.layout.own.get(spec.arch, (self.layout.mean, self.layout.std))
        wanted = backbone.state_dict()
        report = Report(
            file=str(self.path), sha256=self.sha256, layout=self.layout.name, arch=spec.arch, stem=spec.stem,
            image_size=spec.image_size, feature=spec.feature, container=self.container, branch=self.prefix.rstrip("."),
            branches=[p.rstrip(".") for p in self.branches() if p != self.prefix], matched=len(how.found),
            missing=how.missing,
            unexpected=[raw[n][0] if n in raw else self.prefix + n for n in how.unexpected] + strays,
            reshaped=[f"{n} {list(laid.shapes[n])} for {list(wanted[n].shape)}" for n in how.reshaped],
            dropped={k: n for k, (n, _) in dropped.items()}, reasons={k: why for k, (_, why) in dropped.items()},
            epoch=self.meta.get("epoch"), recorded_arch=self.meta.get("arch"),
            mean=list(self.meta.get("mean") or _timm_colours(backbone, "mean") or mean),
            std=list(self.meta.get("std") or _timm_colours(backbone, "std") or std))
        report.notes = resampled + laid.notes(inside) + self._notes(spec)
        heads, recorded = attention_heads(backbone), self.meta.get("heads")
        if report.missing or report.unexpected or report.reshaped:
            report.error = self._mismatch(report)
        elif heads and recorded and heads != recorded:
            report.error = (f"{self.path} is of a transformer with {recorded} heads, as its config.json says, and "
                            f"{spec.arch} has {heads}; give another --arch, or leave it out")
        else:
            turned = ((x, other_rotation(x, inside[x], backbone)) for x in laid.left_out)
            report.error = next((f"{self.path}: {self.prefix}{x} {said}; give the network that it belongs to"
                                 for x, said in turned if said), None) or self._unsound(
                {x: (name, wanted[name].dtype) for name in how.found for x in raw[name]})
        return report, {name: laid.tensors[name] for name in how.found}

    def _unsound(self, found: Mapping[str, tuple[str, torch.dtype]]) -> str | None:
        """A sentence about the first tensor whose values a trained trunk cannot have; None if there is none. ``found``:
        {name in the file: (name in the trunk, dtype in the trunk)}."""
        troubles = ((raw, trouble(name, self.tensors[raw], wanted)) for raw, (name, wanted) in found.items()
                    if raw in self.tensors)
        return next((sentence(str(self.path), raw, said) for raw, said in troubles if said), None)

    def _notes(self, spec: Spec) -> list[str]:
        arch, then = spec.arch, self.meta.get("code_sha256")
        if spec.code_sha256 and then and then != spec.code_sha256:
            return [f"the code of {arch} has changed since these weights were saved (SHA-256 {then[:12]}…, now "
                    f"{spec.code_sha256[:12]}…)"]
        notes = [f"it records {x}, but {arch} was taken" for x in self._recorded()
                 if known_arch(x) and x not in (arch, name_there(arch))]
        twins = [x for x in VITS if arch in VITS and x != arch and VITS[x][:2] == VITS[arch][:2]]
        return notes + [f"its tensors would fit {twin} too, which has another number of heads" for twin in twins]

    def branches(self) -> list[str]:
        """The prefixes of all trunks of the layout that this file holds, the default first."""
        return [p for p in (self.layout.prefix, *self.layout.branches) if has_convolution(self.tensors, p)]

    def head(self) -> nn.Sequential:
        """The head of the branch. Raises :class:`UserError` if the file has none of a known kind."""
        for pattern in self.layout.head:
            if tensors := self._head_tensors(pattern):
                whose = f"{self.flag} {self.path}: the head {self._absolute(pattern)}*"
                head = head_from(tensors, whose)
                refuse_unsound(tensors, whose)
                return head
        return head_from({}, f"{self.flag} {self.path}")

    def heads(self) -> list[nn.Sequential]:
        """The heads of the branch of a known kind: one for each loss that trained a student, else one or none."""
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
        """The tensors of the branch without its prefix; the number of other known tensors by prefix, with the reason to
        drop them; and unexpected keys."""
        inside: dict[str, Tensor] = {}
        dropped: dict[str, list[Any]] = {k + ".": [n, "outside the weights"] for k, n in self.outside.items()}
        strays = []
        for key, value in self.tensors.items():
            if key in self.layout.elsewhere:
                inside[key] = value
            elif key.startswith(self.prefix):
                inside[key[len(self.prefix):]] = value
            elif place := next((p for p in self._dropped_prefixes() if key.startswith(p)), None):
                why = ("another branch" if place in (self.layout.prefix, *self.layout.branches) else
                       "head" if place in map(self._absolute, self.layout.head) else "no part of the trunk")
                dropped.setdefault(place, [0, why])[0] += 1
            else:
                strays.append(key)
        return inside, dropped, strays

    def _dropped_prefixes(self) -> tuple[str, ...]:
        """The prefixes of everything that a file may contain beside the branch, most specific first."""
        trunks = (p for p in (self.layout.prefix, *self.layout.branches) if p != self.prefix and p)
        return (*trunks, *map(self._absolute, self.layout.head), *self.layout.dropped)

    def _in_file(self, name: str) -> str:
        """The name in the file of the branch's tensor ``name``."""
        return name if name in self.layout.elsewhere else self.prefix + name

    def _absolute(self, pattern: str) -> str:
        return self.prefix + pattern[1:] if pattern.startswith("*") else pattern

    def _local_heads(self) -> tuple[str, ...]:
        """The prefixes of the head after the branch's own prefix or, without such a prefix, of everything outside the
        trunk."""
        starred = tuple(p[1:] for p in self.layout.head if p.startswith("*"))
        # A head has only one of these names: beside fc., MobileNetV3's classifier. belongs to the trunk.
        starred = next(((p,) for p in starred if any(k.startswith(self.prefix + p) for k in self.tensors)), starred)
        return starred if self.prefix else (*starred, *self.layout.head, *self.layout.dropped)

    @functools.cached_property
    def trunk(self) -> Trunk:
        """The selected branch."""
        quick = {"hidden_act": "quick_gelu"} if self.tensors.keys() >= OPENAI else {}
        return Trunk(f"{self.flag} {self.path} ({self.layout.name} layout)", self._sorted()[0], self.layout.authors,
                     self._local_heads(), tuple(self._hints()), {**quick, **self.meta})

    def _prefixes(self) -> list[tuple[str, str]]:
        """Other prefixes under which there is a complete trunk, with its architecture."""
        keys = [name.split(".") for name, value in self.tensors.items() if value.ndim == 4]
        several = {".".join(key[:n]) + "." for key in keys for n in range(1, len(key) - 1)} - set(self.branches())
        found = []
        for prefix in sorted(several):
            inside = {k[len(prefix):]: v.shape for k, v in self.tensors.items() if k.startswith(prefix)}
            if has_family(inside):
                fits = dataclasses.replace(self, prefix=prefix, layout=Layout("", prefix, "")).trunk.fitting()
                found += [(prefix.rstrip("."), fits[0].arch)] if fits else []
        return found

    def _elsewhere(self) -> str:
        """Where else in the file there is a trunk, as the end of a sentence; '' if there is none."""
        inside = self._prefixes()
        several = ", ".join(f"{prefix} ({arch})" for prefix, arch in inside)
        return inside and f"a whole network lies under {several}; give --branch {inside[0][0]}" + (
            " or another of these" if len(inside) > 1 else "") or ""

    def _recorded(self) -> list[str]:
        """The architecture that the file names, under our name for it."""
        arch = self.meta.get("arch")
        return [self.layout.archs.get(arch, arch)] if isinstance(arch, str) else []

    def _hints(self) -> list[str]:
        """The architectures to try first: the one that is recorded, or those of the layout."""
        return self._recorded() or (list(self.layout.archs.values()) if self.layout.prefix else [])

    def _mismatch(self, report: Report) -> str:
        arch = report.recorded_arch
        says = f"; the file says it holds {arch}" if arch and arch != report.arch else ""
        return (f"{self.path} ({report.layout} layout) does not fit {report.arch} with stem '{report.stem}'"
                f"{says}: of the trunk's keys {report.difference()}; {self.trunk.advice(report.arch, report.stem)}")


def _timm_colours(backbone: nn.Module, name: str) -> Colours | None:
    return getattr(backbone, "pretrained_cfg", {}).get(name) if backbone.spec.arch.startswith(TIMM) else None
