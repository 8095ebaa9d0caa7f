"""Export formats of ONNX and detectron2, and how each is read back."""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet

from checkpoints.naming import rename
from checkpoints.snippets import run_code
from checkpoints.targets import Network, Opened, Target
from runtime.errors import UserError


class Onnx(Target):
    """The trunk's graph: ``images`` float32 [batch, 3, S, S], normalised, to ``features`` [batch, d]."""

    what = "an ONNX graph"
    suffix = ".onnx"
    tolerance = 1e-4  # another order of summation
    packages = ("onnx", "onnxscript", "onnxruntime")
    projector = "inside"

    def refuse(self, network: Network) -> str | None:
        """None: only tracing shows whether the network can be exported."""
        return None

    def write(self, network: Network, path: Path) -> None:
        """Trace the network with two images and write the graph, which takes any batch size at one image size."""
        size = network.trunk.spec.image_size
        outputs = ["features"] if network.head is None else ["features", "projected"]
        with silence(), torch.no_grad():
            program = torch.onnx.export(
                _Graph(network.trunk, network.head).eval(), (torch.zeros(2, 3, size, size),), dynamo=True,
                input_names=["images"], output_names=outputs, verbose=False,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
            program.model.metadata_props.update(network.about())
            program.save(path, external_data=False)

    def code(self, network: Network, path: Path) -> str:
        """A session of onnxruntime, with a comment on how to call it."""
        outputs = "features" if network.head is None else "features, projected"
        return (f"import onnxruntime; model = onnxruntime.InferenceSession({str(path)!r}, "
                f"providers=['CPUExecutionProvider'])  # {outputs}{',' * (network.head is None)} = "
                "model.run(None, {'images': normalised})")

    def open(self, network: Network, path: Path, projector: Path) -> Opened:
        """Read the file by onnxruntime. One image is passed separately, to check that the batch size is free."""
        session = run_code(self.code(network, path), "model")
        stored = session.get_modelmeta().custom_metadata_map
        if any(stored.get(k) != v for k, v in network.about().items()):
            raise UserError("the metadata read back differ")

        def features(images: Tensor) -> list[Tensor]:
            pieces = [session.run(None, {"images": x.contiguous().numpy()}) for x in (images[:1], images[1:]) if len(x)]
            return [torch.cat([torch.from_numpy(x) for x in column]) for column in zip(*pieces, strict=True)]
        return features


class Detectron2(Target):
    """The pickle of numpy arrays that detectron2 reads as ``MODEL.WEIGHTS``, as MoCo's conversion script writes it."""

    what = "detectron2's pickle"
    suffix = ".pkl"
    projector = ""

    def refuse(self, network: Network) -> str | None:
        """Refuses anything but a ResNet with the imagenet stem."""
        if not isinstance(network.trunk, ResNet):
            return "detectron2's backbones are ResNets; choose --to torchvision, safetensors or onnx"
        if network.trunk.spec.stem != "imagenet":
            return (f"its stem is {network.trunk.spec.stem}, but detectron2's ResNets have the imagenet stem; choose "
                    "--to torchvision, safetensors or onnx")
        return None

    def write(self, network: Network, path: Path) -> None:
        """Write the pickle, without num_batches_tracked, because frozen batch norm counts no batches."""
        model = {rename(name, "detectron2", inverse=True): value.numpy()
                 for name, value in network.trunk.state_dict().items() if not name.endswith(".num_batches_tracked")}
        with path.open("wb") as file:
            pickle.dump({"model": model, "__author__": "CoSS export.py", "matching_heuristics": True,
                         "settings": self.settings(network)}, file)  # the last is for scripts/detection alone

    def settings(self, network: Network) -> dict[str, Any]:
        """The settings with which detectron2 builds and feeds the same network, by their full names."""
        resnet = network.trunk
        depth = {"BasicBlock": 2, "Bottleneck": 3}[type(resnet.layer1[0]).__name__] * sum(
            len(getattr(resnet, f"layer{n}")) for n in (1, 2, 3, 4)) + 2
        basic = {"RES2_OUT_CHANNELS": 64} if depth in (18, 34) else {}
        settings = {"DEPTH": depth, "NUM_GROUPS": resnet.groups, "WIDTH_PER_GROUP": resnet.base_width,
                    "STRIDE_IN_1X1": False, **basic}
        scaled = {f"MODEL.PIXEL_{k.upper()}": [round(255 * x, 3) for x in getattr(network.report, k)]
                  for k in ("mean", "std")}
        return {**{f"MODEL.RESNETS.{k}": v for k, v in settings.items()}, **scaled, "INPUT.FORMAT": "RGB"}

    def code(self, network: Network, path: Path) -> str:
        """A line that gives detectron2 the file and those settings."""
        pairs = {"MODEL.WEIGHTS": str(path), **self.settings(network)}
        return f"cfg.merge_from_list({[x for pair in pairs.items() for x in pair]!r})"

    def open(self, network: Network, path: Path, projector: Path) -> Opened:
        """Unpickle the file as detectron2 does, rename its tensors back, and load them into torchvision's network."""
        with path.open("rb") as file:
            arrays = pickle.load(file, encoding="latin1")["model"]  # our own, written a moment ago
        model = run_code(network.trunk_code, "model").eval()
        model.load_state_dict({_from_detectron2(name): torch.from_numpy(array) for name, array in arrays.items()})
        return lambda images: [torch.no_grad()(model)(images)]


class _Graph(nn.Module):
    """Trunk and head as one graph with one or two outputs."""

    def __init__(self, trunk: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.trunk(images)
        return features if self.head is None else (features, self.head(features))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Silences the progress that the exporter prints, warns and logs; errors are still raised."""
    threshold, fast_path = logging.root.manager.disable, torch.backends.mha.get_fastpath_enabled()
    logging.disable(logging.ERROR)
    torch.backends.mha.set_fastpath_enabled(False)  # attention in one operator, which ONNX does not have
    try:
        with (warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()),
              contextlib.redirect_stderr(io.StringIO())):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        logging.disable(threshold)


def _from_detectron2(name: str) -> str:
    """torchvision's name, computed without :mod:`checkpoints.naming`, so that an error there cannot cancel out."""
    name = name.removeprefix("stem.").replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    for n in (1, 2, 3):
        name = name.replace(f"conv{n}.norm.", f"bn{n}.")
    return f"layer{int(name[3]) - 1}{name[4:]}" if name.startswith("res") else name
