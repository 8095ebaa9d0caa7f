"""One branch of a checkpoint as a trunk: how it fits a network, which networks it fits, and which is nearest."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor, nn

from checkpoints.authors import to_authors
from checkpoints.identify import (
    Fit,
    Identity,
    fit,
    has_family,
    hollow_trunk,
    identify,
    near_miss,
    transformer_image_size,
)
from checkpoints.timm_names import POSITIONS, timm_candidates, told_apart
from checkpoints.translation import Translation, translate, without_numbers
from checkpoints.translation import image_size as native_size
from models.backbones import TIMM
from models.tokens import evaluated_size, fitted_positions, position_table
from models.vit import attention_heads
from runtime.errors import UserError
from runtime.own import is_own
from runtime.packages import need_package

BLOCK_BIAS = re.compile(r"(.*\.)?(blocks|layers?)\.\d+\..*bias$")


@dataclass(frozen=True)
class Trunk:
    """The ``tensors`` of a branch without its prefix, including heads, whose prefixes are ``heads``.

    ``whose`` begins messages. ``authors`` is the prefix that timm's converter expects for the branch, ``hints`` are
    architectures to try first, ``says`` holds what the file records: hidden_act, heads, image_size, mean.
    """

    whose: str
    tensors: Mapping[str, Tensor]
    authors: str
    heads: tuple[str, ...]
    hints: tuple[str, ...]
    says: Mapping[str, Any]

    @functools.cached_property
    def hollow(self) -> dict[str, Tensor]:
        """The tensors, except those of heads, on the meta device."""
        return without_numbers({k: v for k, v in self.tensors.items() if not k.startswith(self.heads)})

    @functools.cached_property
    def shapes(self) -> dict[str, Size]:
        """The shapes of :attr:`hollow` under the names of torchvision's networks and ours, as far as they are known."""
        return translate(self.hollow, "", None).shapes

    def lay(self, backbone: nn.Module, tensors: Mapping[str, Tensor] | None = None,
            ) -> tuple[Translation, Fit, list[str]]:
        """The ``tensors``, by default all, under the names of ``backbone``; how they fit; and in words, which position
        embeddings were resampled."""
        arch, stem, given = backbone.spec.arch, backbone.spec.stem, self.tensors if tensors is None else tensors
        if is_own(arch):  # names that no library knows stay as they are
            laid = Translation(dict(given), {name: (name,) for name in given}, [])
            return laid, fit(laid.shapes, {k: v.shape for k, v in backbone.state_dict().items()}, backbone.spec,
                             self.heads), []
        try:
            laid = translate(given, self.authors, backbone if arch.startswith(TIMM) else None)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - timm's converters fail in any way on files that are not theirs
            raise UserError(f"{self.whose} does not fit {arch}: timm's converter for its files fails "
                            f"({type(error).__name__}: {' '.join(str(error).split())[:100]}); "
                            f"{self.advice(arch, stem)}") from None
        wanted = {name: value.shape for name, value in backbone.state_dict().items()}
        resampled = _fit_positions(laid.tensors, backbone)
        how = fit(laid.shapes, wanted, backbone.spec, self.heads)
        resized = [n for n in laid.resized(given) if n in how.found and not n.endswith(POSITIONS)]
        how.found = [name for name in how.found if name not in resized]
        how.reshaped += resized
        lost = [name for name in laid.left_out if BLOCK_BIAS.match(name)]
        how.unexpected += [name for name in lost if bool(self.tensors[name].count_nonzero())]  # zeros have no effect
        return laid, how, resampled

    def native_size(self, arch: str) -> int | None:
        """The image size, in pixels, that the file's position embeddings are for."""
        if not arch.startswith(TIMM):
            return transformer_image_size(self.shapes)
        return native_size({self.authors + k: v.shape for k, v in to_authors(self.hollow).items()})

    def stem(self) -> str:
        """``cifar`` for a ResNet whose first convolution is 3x3, else ``imagenet``."""
        first = self.shapes.get("conv1.weight", Size())
        return "cifar" if "layer1.0.conv1.weight" in self.shapes and first[-1:] == (3,) and (
            "conv3.weight" not in self.shapes) else "imagenet"

    def fitting(self, image_size: int | None = None) -> list[Identity]:
        """The architectures that the trunk fits exactly: torchvision's and our own before timm's."""
        found: list[Identity] = []
        if has_family(self.shapes) or not self._timm_names:
            found = identify(self.shapes, self.hints, image_size or self.says.get("image_size"))
        found = found or [identity for identity, how in self._in_timm() if how.exact]
        kept = told_apart([x.arch for x in found], self.says.get("hidden_act"), "mean" in self.says)
        heads = self.says.get("heads")
        return [x for x in found if x.arch in kept and heads in (None, attention_heads(hollow_trunk(x)))]

    def near_miss(self, asked: str = "") -> str:
        """The network that the trunk resembles, as the end of a sentence; ``asked`` is the architecture that was given.
        """
        others = [(x.arch, how) for x, how in self._in_timm() if x.arch != asked and how.found]
        if not others:
            return near_miss(self.shapes, asked)
        arch, how = max(others, key=lambda x: len(x[1].found) - len(x[1].missing) - len(x[1].unexpected))
        return f"nearest is {arch}, with {how.difference()}"

    def advice(self, arch: str, stem: str) -> str:
        """What to do if the file does not fit the architecture that was given, as the end of a sentence."""
        fits = self.fitting()
        if not fits:
            return self.near_miss(arch)
        if any(x.arch.partition(".")[0] == arch.partition(".")[0] and x.stem == stem for x in fits):
            return "its trunk fits, so save only that, without the unexpected keys, and give the new file"
        return f"it fits {fits[0].arch} with stem '{fits[0].stem}', so give that"

    @functools.cached_property
    def _timm_names(self) -> list[str]:
        """timm's networks that names and width suggest."""
        return timm_candidates({self.authors + k: v.shape for k, v in to_authors(self.hollow).items()})

    def _in_timm(self) -> list[tuple[Identity, Fit]]:
        """The networks of timm whose authors' files have such names, and how the trunk fits them."""
        found = []
        for arch in self._timm_names:
            need_package("timm", f"the network in {self.whose}")
            identity = Identity(arch, "imagenet", evaluated_size(arch) or self.native_size(arch) or 224)
            try:
                found.append((identity, self.lay(hollow_trunk(identity), self.hollow)[1]))
            except Exception:  # noqa: BLE001 - a network that cannot be built so, or whose converter fails, cannot be it
                continue
        return found


def _fit_positions(tensors: dict[str, Tensor], backbone: nn.Module) -> list[str]:
    """Resample a transformer's position embeddings to ``backbone``'s image size; returns what was done, in words."""
    name, prefix = position_table(backbone) or ("", 0)
    fitted = fitted_positions(tensors[name], backbone.state_dict()[name], prefix) if name in tensors else None
    if fitted is None:
        return []
    tensors[name] = fitted[0]
    return [fitted[1]]


def has_convolution(tensors: dict[str, Tensor], prefix: str) -> bool:
    """Whether ``prefix`` leads to a trunk of convolutions or patches, which RADIO embeds by a matrix."""
    return any(value.ndim == 4 and name.startswith(prefix) for name, value in tensors.items()) or (
        f"{prefix}model.patch_generator.embedder.weight" in tensors)
