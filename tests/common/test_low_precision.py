"""fp16 and int8 of a small graph written here, its features by onnxruntime and its neighbours by numpy."""

import numpy as np
import pytest
import torch
from helpers import small  # noqa: F401 - resnet_small

from checkpoints.conversion import export
from checkpoints.frozen import untrained
from checkpoints.report import Report
from checkpoints.targets import Network
from common.low_precision import LEAST, K, LowPrecision, converted_summary
from runtime.errors import UserError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
IMAGES = torch.randint(256, (2 * LEAST + 2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalise(images):
    return images.float() / 128 - 1


@pytest.fixture
def graph(tmp_path):
    """Two convolutions and an average: ``images`` [batch, 3, 8, 8] to ``features`` [batch, 16]."""
    numbers = np.random.default_rng(0)
    weights = {"a": numbers.normal(0, 0.3, (8, 3, 3, 3)), "b": numbers.normal(0, 0.3, (16, 8, 3, 3))}
    nodes = [onnx.helper.make_node("Conv", ["images", "a"], ["x"], strides=[2, 2]),
             onnx.helper.make_node("Relu", ["x"], ["y"]), onnx.helper.make_node("Conv", ["y", "b"], ["z"]),
             onnx.helper.make_node("GlobalAveragePool", ["z"], ["p"]),
             onnx.helper.make_node("Flatten", ["p"], ["features"])]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in (
        ("images", ["batch", 3, 8, 8]), ("features", ["batch", 16]))]
    model = onnx.helper.make_model(onnx.helper.make_graph(
        nodes, "small", ends[:1], ends[1:],
        [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]),
        opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.helper.set_model_props(model, {"arch": "small"})
    onnx.save(model, tmp_path / "o.onnx")
    return tmp_path / "o.onnx"


def opened(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(session.run(None, {"images": images.contiguous().numpy()})[0])]


def neighbours(features):
    rows = features.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -2)
    return np.argsort(-cosines, axis=1)[:, :K]


@pytest.mark.parametrize(("precision", "compared"), [("fp16", IMAGES), ("int8", IMAGES[1::2])])
def test_a_graph_keeps_its_neighbours(graph, precision, compared):
    before = opened(graph)(normalise(compared))[0]
    said = LowPrecision(precision, 50.0).converter(IMAGES, normalise, "o.onnx")(graph, lambda: opened(graph))
    after = opened(graph)(normalise(compared))[0]
    pairs = zip(neighbours(before), neighbours(after), strict=True)
    assert said["overlap"] == pytest.approx(100 * np.mean([len({*a} & {*b}) / K for a, b in pairs]), abs=0.2)
    assert said["cosine"] == pytest.approx(float(torch.cosine_similarity(before, after).mean()), abs=1e-6)
    assert 0 < float((before - after).abs().mean()) < 0.05 * float(before.abs().mean())  # other numbers, one network
    assert (said["compared"], said["calibration"]) == (len(compared), len(IMAGES) - len(compared))
    model = onnx.load(graph)
    kinds = {x.data_type for x in model.graph.initializer}
    assert {"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}[precision] in kinds
    assert {x.key: x.value for x in model.metadata_props} == {"arch": "small"}
    assert [path.name for path in graph.parent.iterdir()] == ["o.onnx"]
    assert f"then made {precision}" in converted_summary(said, graph.stat().st_size)


def test_only_the_even_images_calibrate(graph):
    dark = IMAGES.clone()
    dark[::2] = 128  # zeros: with no range to go by, every activation of the others is cut off
    with pytest.raises(UserError, match=r"not written: in int8, 65 images share .* less than --min-overlap 90; choose "
                                        "--precision fp16, or lower the limit"):
        LowPrecision("int8", 90.0).converter(dark, normalise, "o.onnx")(graph, lambda: opened(graph))


@pytest.mark.parametrize("fails", ["refused", "broken"])
def test_a_graph_that_is_not_accepted_leaves_nothing(tmp_path, monkeypatch, graph, fails):
    """As the last step of an export, here of a state dict, which the graph replaces."""
    network = Network(untrained("resnet_small", 32).backbone, None, Report("student.pth"))
    if fails == "broken":
        monkeypatch.setattr("common.low_precision._to_half", lambda path: path.write_bytes(b"no graph"))
    convert = LowPrecision("fp16", 100.0).converter(IMAGES, normalise, "o.pth")
    bad, out = opened(graph), tmp_path / "out" / "o.pth"
    out.parent.mkdir()

    def convert_graph(path, _):
        path.write_bytes(graph.read_bytes())
        asked = iter([opened(path), lambda images: [-bad(images)[0].flip(0)]])
        return convert(path, lambda: next(asked) if fails == "refused" else opened(path))

    says = "in fp16, 130 images share" if fails == "refused" else r"onnxruntime cannot make it fp16 \(\w+: "
    with pytest.raises(UserError, match=says) as error:
        export(network, "state_dict", out, {"random": torch.randn(2, 3, 32, 32)}, convert_graph)
    assert "\n" not in str(error.value)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(("target", "data", "says"), [
    ("timm", "photos", "--precision int8 is for --to onnx, not --to timm"), ("onnx", None, "int8 needs --data")])
def test_flags_that_do_not_go_together(target, data, says):
    with pytest.raises(UserError, match=says):
        LowPrecision("int8").check(target, data)


def test_too_few_images():
    LowPrecision("fp16").share(IMAGES[:LEAST])
    with pytest.raises(UserError, match="give 127 images, but --precision int8 needs at least 128"):
        LowPrecision("int8").share(IMAGES[:127])
