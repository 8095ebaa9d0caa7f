"""Export formats that torchvision's networks load, and how each is read back.

A target writes one file, gives the line of Python that loads it, and opens it again as the program does that it is for.
:func:`checkpoints.conversion.export` compares the features.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.frozen import load_frozen
from checkpoints.report import Report
from checkpoints.snippets import head_code, run_code, trunk_code
from models.backbones import TIMM
from models.original import ORIGINALS
from models.teachers import FrozenEncoder
from runtime.errors import UserError
from runtime.own import is_own

Opened = Callable[[Tensor], list[Tensor]]  # normalised images [b, 3, S, S] -> features [b, d] (and projected [b, d'])
MOCO = "module.encoder_q."


@dataclass(frozen=True)
class Network:
    """What is exported: a trunk in evaluation mode, its own head if asked for, and the report of their file."""

    trunk: nn.Module
    head: nn.Sequential | None
    report: Report

    @classmethod
    def of(cls, encoder: FrozenEncoder, report: Report) -> Network:
        """From :func:`checkpoints.frozen.load_frozen`."""
        return cls(encoder.backbone, encoder.head, report)

    @functools.cached_property
    def trunk_code(self) -> str:
        """:func:`checkpoints.snippets.trunk_code`, made once, since that builds a network."""
        return trunk_code(self.trunk)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        features = self.trunk(images)
        return [features] if self.head is None else [features, self.head(features)]

    def about(self) -> dict[str, str]:
        """The text metadata of a format, under the names that our own reader expects."""
        return {**{k: str(v) for k, v in self.trunk.spec.identity().items()}, "mean": json.dumps(self.report.mean),
                "std": json.dumps(self.report.std), "source_sha256": self.report.sha256}


class Target:
    """One format. ``tolerance``: the largest allowed difference of features divided by their largest magnitude."""

    what = ""  # what is written, in words
    suffix = ".pth"
    tolerance = 0.0
    packages: tuple[str, ...] = ()
    imports = ""  # imports at the start of the line that loads the file
    projector = "beside"  # in a separate file; "inside": in the same file; "": the format cannot store it

    def refuse(self, network: Network) -> str | None:
        """Why this format cannot hold the network, and what to do; None if it can."""
        if network.trunk.spec.arch in ORIGINALS:
            return ("torchvision's network of that name is a different one; choose --to timm (EfficientNets), "
                    "safetensors or onnx (the original's scripts read student.pth unchanged)")
        if network.trunk.spec.arch.startswith(TIMM):
            return "torchvision has no builder for it; choose --to timm, safetensors or onnx"
        if is_own(network.trunk.spec.arch):
            return "it is of your own code, which only names its tensors; choose --to state_dict, safetensors or onnx"
        return None

    def write(self, network: Network, path: Path) -> None:
        """Write the file."""
        torch.save(network.trunk.state_dict(), path)

    def write_projector(self, network: Network, path: Path) -> None:
        """Write the projector's file, for targets that store it ``beside``."""
        torch.save(network.head.state_dict(), path)

    def read_code(self, path: Path) -> str:
        """An expression for the state dict in ``path``."""
        return f"torch.load({str(path)!r})"

    def code(self, network: Network, path: Path) -> str:
        """The line that loads the file and leaves ``model``."""
        return f"{self.imports}{network.trunk_code}; model.load_state_dict({self.read_code(path)}); model.eval()"

    def projector_code(self, network: Network, path: Path) -> str:
        """The line that loads the projector and leaves ``projector``."""
        return (f"{self.imports}import torch; {head_code(network.head)}; "
                f"projector.load_state_dict({self.read_code(path)}); projector.eval()")

    def open(self, network: Network, path: Path, projector: Path) -> Opened:
        """Read the file back by the lines above; ``projector`` is the file that holds the projector."""
        parts = [run_code(self.code(network, path), "model")]
        if network.head is not None:
            parts.append(run_code(self.projector_code(network, projector), "projector"))
        for part in parts:
            part.requires_grad_(False)  # like the source, because attention uses another kernel for trainable weights

        @torch.no_grad()
        def features(images: Tensor) -> list[Tensor]:
            outputs = [parts[0](images)]
            return outputs + [projector(outputs[0]) for projector in parts[1:]]
        return features


class Torchvision(Target):
    """A bare state dict under torchvision's names, without the classifier's."""

    what = "a state dict under torchvision's names"


class StateDict(Target):
    """A bare state dict under the names of whichever library has the network, or of one's own code."""

    what = "a state dict under the network's own names"

    def refuse(self, network: Network) -> str | None:
        """Every network has names."""
        return None


class Moco(Target):
    """MoCo's layout, whose linear evaluation keeps ``module.encoder_q.*`` without ``fc`` and drops the rest."""

    what = "MoCo's layout"
    projector = "inside"

    def write(self, network: Network, path: Path) -> None:
        """Write epoch, arch, state_dict, and the description that our own reader would otherwise have to infer."""
        state = {MOCO + name: value for name, value in network.trunk.state_dict().items()}
        if network.head is not None:
            state.update((f"{MOCO}fc.{name}", value) for name, value in network.head.state_dict().items())
        torch.save({"epoch": network.report.epoch or 0, **network.trunk.spec.record(), "mean": network.report.mean,
                    "std": network.report.std, "state_dict": state}, path)

    def read_code(self, path: Path) -> str:
        """The trunk's tensors as MoCo's main_lincls.py picks them."""
        return (f"{{k.removeprefix({MOCO!r}): v for k, v in torch.load({str(path)!r})['state_dict'].items() "
                f"if k.startswith({MOCO!r}) and not k.startswith({MOCO + 'fc.'!r})}}")

    def projector_code(self, network: Network, path: Path) -> str:
        """MoCo's ``fc``."""
        return (f"import torch; {head_code(network.head)}; projector.load_state_dict({{k.removeprefix({MOCO + 'fc.'!r})"
                f": v for k, v in torch.load({str(path)!r})['state_dict'].items() if k.startswith({MOCO + 'fc.'!r})}}"
                "); projector.eval()")


class Safetensors(Target):
    """A safetensors file under torchvision's names (timm's for a network of timm's), with text metadata."""

    what = "safetensors under the library's names"
    suffix = ".safetensors"
    packages = ("safetensors",)
    imports = "import safetensors.torch; "

    def refuse(self, network: Network) -> str | None:
        """Every network has names."""
        return None

    def write(self, network: Network, path: Path) -> None:
        """Write the trunk and its description."""
        _save_safetensors(network.trunk, path, network.about())

    def write_projector(self, network: Network, path: Path) -> None:
        """Write the projector, and the SHA-256 of the checkpoint that it comes from."""
        _save_safetensors(network.head, path, {"source_sha256": network.report.sha256})

    def read_code(self, path: Path) -> str:
        """By the safetensors package."""
        return f"safetensors.torch.load_file({str(path)!r})"

    def open(self, network: Network, path: Path, projector: Path) -> Opened:
        """Read the file by that package, and by our own reader, which must find the same network."""
        own = network.trunk.spec.arch if is_own(network.trunk.spec.arch) else None  # which a command line has named
        encoder, report = load_frozen(path, own, flag="--output")
        if (encoder.backbone.spec, report.mean, report.std) != (
                network.trunk.spec, network.report.mean, network.report.std):
            raise UserError(f"the metadata read back say {encoder.backbone.spec.record()}, which is another network")
        ours, theirs = encoder.backbone.state_dict(), network.trunk.state_dict()
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[k], theirs[k]) for k in ours):
            raise UserError("tensors read back differ")
        return super().open(network, path, projector)


def _save_safetensors(module: nn.Module, path: Path, about: dict[str, str]) -> None:
    from safetensors.torch import save

    tensors = {name: value.contiguous() for name, value in module.state_dict().items()}
    path.write_bytes(save(tensors, metadata={"format": "pt", **about}))  # save_file would make it private
