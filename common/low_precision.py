"""export.py --precision: an ONNX graph in fp16 or int8 by onnxruntime's own tools, refused if it loses neighbours."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from checkpoints.conversion import Convert, while_writing
from checkpoints.targets import Opened
from checkpoints.targets_elsewhere import silence
from evals.overlap import shared_neighbours
from runtime.errors import UserError
from runtime.settings import Setting, Used

FLOAT, HALF, INT8 = "float32", "fp16", "int8"
K = 11       # neighbours that are compared, the middle of evals.overlap.KS
LEAST = 64   # images to compare, below which sharing the neighbours means little
BATCH = 16   # images per forward pass
TIMED = 20   # passes, of which the fastest counts


@dataclass(frozen=True)
class LowPrecision:
    """Into which numbers a graph is converted, and when the result is accepted."""

    precision: Annotated[str, Setting(
        "numbers in the graph of --to onnx: float32 (default), fp16, or int8, quantised with half of the images of "
        "--data; accepted if the other half keep their neighbours", choices=(FLOAT, HALF, INT8), basic=True)] = FLOAT
    min_overlap: Annotated[float, Setting(
        f"least percentage of the {K} nearest neighbours that images must share between the float32 graph and the "
        "converted one, else nothing is written; default {default}", least=0, most=100, metavar="P"), Used(
        f"with --precision {HALF} and {INT8}", lambda args: args.precision != "float32")] = 80.0

    def check(self, target: str, data: str | None) -> None:
        """Raise :class:`UserError` if the other flags do not go with the precision."""
        if self.precision == FLOAT:
            return
        if target != "onnx":
            raise UserError(f"--precision {self.precision} is for --to onnx, not --to {target}; omit one of the two")
        if data is None:
            raise UserError(f"--precision {self.precision} needs --data with real images, on which it is checked "
                            "whether neighbours stay; give a folder of images")

    def share(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``images`` [n, ...] as those that calibrate and those that are compared. Raises :class:`UserError` for too
        few."""
        halves = (images[::2], images[1::2]) if self.precision == INT8 else (images[:0], images)
        if len(halves[1]) < LEAST:
            raise UserError(f"--data and --images give {len(images)} images, but --precision {self.precision} needs at "
                            f"least {LEAST * (1 + (self.precision == INT8))}; give more")
        return halves

    def converter(self, images: Tensor, normalise: Callable[[Tensor], Tensor], output: str) -> Convert:
        """A function for checkpoints.conversion.export that converts the graph in a file and compares the result.

        ``images``: uint8 [n, 3, S, S]; ``normalise`` makes the graph's input of them. ``output``: for messages.
        """
        calibrating, compared = self.share(images)

        def features(graph: Opened) -> list[Tensor]:
            outputs = [graph(normalise(batch)) for batch in compared.split(BATCH)]
            return [torch.cat(column) for column in zip(*outputs, strict=True)]

        def convert(path: Path, reopen: Callable[[], Opened]) -> dict[str, Any]:
            graph, size = reopen(), path.stat().st_size
            try:
                with silence(), while_writing(path, size):
                    _to_half(path) if self.precision == HALF else _to_int8(path, calibrating, normalise)
                converted = reopen()
                kept = agreement(features(graph), features(converted))
                ratio = time_ratio(graph, converted, normalise(compared[:1]))
            except OSError:
                raise
            except Exception as error:  # onnxruntime raises many kinds of errors
                text = str(error).strip().partition("\n")[0][:200]
                raise UserError(f"--output {output} was not written: onnxruntime cannot make it {self.precision} "
                                f"({type(error).__name__}: {text}); choose another --precision") from error
            if not kept["overlap"] >= self.min_overlap:
                raise UserError(
                    f"--output {output} was not written: in {self.precision}, {len(compared)} images share "
                    f"{kept['overlap']:.1f} % of their {K} nearest neighbours with the float32 graph (mean cosine of "
                    f"features {kept['cosine']:.4f}), less than --min-overlap {self.min_overlap:g}; "
                    + ("choose --precision fp16, or lower" if self.precision == INT8 else "lower") + " the limit")
            return {"precision": self.precision, **kept, "min_overlap": self.min_overlap, "k": K,
                    "chance": 100 * K / (len(compared) - 1), "compared": len(compared),
                    "calibration": len(calibrating), "float32_bytes": size, "time_ratio": ratio}
        return convert


def agreement(ours: list[Tensor], theirs: list[Tensor]) -> dict[str, float]:
    """``overlap``, percent of the K nearest neighbours that are the same, and ``cosine``, the mean of the images' rows.

    From all outputs [n, d] of two graphs for the same images; the worst output counts. Raises ValueError for values
    that are not finite.
    """
    if not all(torch.isfinite(x).all() for x in theirs):
        raise ValueError("its features are not finite")
    pairs = list(zip(ours, theirs, strict=True))
    return {"overlap": min(shared_neighbours(a, b, (K,))[K] for a, b in pairs),
            "cosine": min(float(torch.cosine_similarity(a, b).mean()) for a, b in pairs)}


def converted_summary(record: dict[str, Any], size: int) -> str:
    """What became of the graph, in a sentence; ``size``: of the file in bytes."""
    calibrated = f", calibrated on {record['calibration']} others" if record["calibration"] else ""
    return (f"then made {record['precision']}{calibrated}: {record['float32_bytes'] / 1e6:.2f} -> {size / 1e6:.2f} MB; "
            f"{record['compared']} images share {record['overlap']:.1f} % of their {record['k']} nearest neighbours "
            f"with the float32 graph (at least {record['min_overlap']:g}; by chance {record['chance']:.1f}), mean "
            f"cosine of features {record['cosine']:.4f}; one image takes {record['time_ratio']:.2f} of the time here")


def time_ratio(before: Opened, after: Opened, image: Tensor) -> float:
    """The time that ``after`` takes for one image [1, 3, S, S] divided by that of ``before``, on this machine."""
    fastest = [float("inf")] * 2
    for _ in range(TIMED):
        for i, graph in enumerate((before, after)):
            start = time.perf_counter()
            graph(image)
            fastest[i] = min(fastest[i], time.perf_counter() - start)
    return fastest[1] / fastest[0]


def _to_half(path: Path) -> None:
    """Weights and computation in float16; inputs, outputs and layer norms stay float32: on a CPU, onnxruntime ends the
    process when it opens a ViT whose layer norms are float16."""
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    stay = [*DEFAULT_OP_BLOCK_LIST, "LayerNormalization"]
    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True, op_block_list=stay), path)


def _to_int8(path: Path, images: Tensor, normalise: Callable[[Tensor], Tensor]) -> None:
    """Static quantisation: weights to int8 by channel, activations to uint8 by the range that ``images`` show."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        batches = iter(images.split(BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": normalise(batch).contiguous().numpy()}

    about, folded = onnx.load(path).metadata_props, path.with_suffix(".folded.onnx")
    quant_pre_process(str(path), str(folded), skip_symbolic_shape=True)
    quantization.quantize_static(str(folded), str(path), Reader(), per_channel=True,
                                 activation_type=quantization.QuantType.QUInt8)
    folded.unlink()
    graph = onnx.load(path)
    graph.metadata_props.clear()
    graph.metadata_props.extend(about)
    onnx.save(graph, path)
