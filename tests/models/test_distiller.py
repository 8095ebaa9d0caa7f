"""The student: its heads by name, each view by itself, the original's key names."""

import pytest
import torch

from models.backbones import build_backbone
from models.distiller import Distiller, agreement
from models.heads import build_head, build_heads
from models.teachers import Normalise


def images(b=4, size=32):
    return torch.randint(0, 256, (b, 3, size, size), dtype=torch.uint8)


def test_no_projection_between_equal_widths():
    head = build_head("projection", 512, 512)
    assert not list(head.parameters())
    x = torch.randn(3, 512)
    assert torch.equal(head(x), x)


@pytest.mark.parametrize(("name", "student", "out", "hidden"), [
    ("projection", 512, 2048, 2048), ("projection", 2048, 512, 2048), ("projection", 1280, 1281, 2048),
    ("mlp", 512, 128, 512), ("wide", 512, 128, 2048), ("wide", 128, 128, 2048)])
def test_heads_of_two_layers(name, student, out, hidden):
    head = build_head(name, student, out)
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == {
        "0.weight": (hidden, student), "0.bias": (hidden,), "2.weight": (out, hidden), "2.bias": (out,)}
    x, (w0, b0, w2, b2) = torch.randn(3, student), head.state_dict().values()
    expected = (x @ w0.T + b0).clamp_min(0) @ w2.T + b2
    torch.testing.assert_close(head(x.clone()), expected, rtol=1e-4, atol=1e-5)


def test_the_linear_head_is_there_between_equal_widths_too():
    head, x = build_head("linear", 5, 5), torch.randn(3, 5)
    torch.testing.assert_close(head(x), x @ head.weight.T + head.bias)


@pytest.mark.parametrize("out", [512, 640])
def test_forward_is_trunk_and_head(out):
    backbone = build_backbone("squeezenet_small", image_size=32).eval()
    student, batch = Distiller(backbone, build_head("projection", 512, out)), images()
    outputs = student(batch)
    assert len(outputs) == 1
    assert torch.equal(outputs[0], student.proj_head(backbone(Normalise()(batch))))


def test_each_view_passes_alone():
    """Batch statistics are one view's: two views give what each gives by itself, in order."""
    student = Distiller(build_backbone("shufflenet_small", image_size=32), build_head("projection", 1024, 1024))
    one, two = images(), images()
    both = student(one, two)
    assert torch.equal(both[0], student(one)[0])
    assert torch.equal(both[1], student(two)[0])
    assert not torch.allclose(both[0], student(torch.cat([one, two]))[0][:4], rtol=1e-3)


def test_several_heads_on_one_trunk():
    backbone = build_backbone("squeezenet_small", image_size=32).eval()
    heads = build_heads((("projection", "features"), ("mlp", "head"), ("none", "features")), 512,
                        {"features": 640, "head": 16})
    student, views = Distiller(backbone, heads), [images(), images()]
    outputs = student(*views)
    assert [x.shape[1] for x in outputs] == [640, 16, 512] * 2
    features = backbone(Normalise()(views[1]))
    assert torch.equal(outputs[4], heads["mlp_head"](features))
    assert torch.equal(outputs[5], features)
    assert {k.split(".")[1] for k in student.state_dict() if k.startswith("proj_head.")} == {
        "projection_features", "mlp_head"}


def test_state_keys_are_the_originals():
    backbone = build_backbone("resnet18", image_size=32)
    trunk = {f"backbone.{key}" for key in backbone.state_dict()}
    head = {f"proj_head.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    student = Distiller(backbone, build_head("projection", 512, 2048))
    assert set(student.state_dict()) == set(student.student_state()) == trunk | head
    assert set(Distiller(build_backbone("resnet18"), build_head("projection", 512, 512)).state_dict()) == trunk
    assert student.record() == {"arch": "resnet18", "stem": "imagenet", "image_size": 32, "feature": "pool",
                                "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def test_agreement_against_numpy():
    import numpy as np

    student, teacher = torch.randn(10, 4, dtype=torch.float64), torch.randn(10, 4, dtype=torch.float64)
    found = agreement(student, teacher)
    s, t = student.numpy(), teacher.numpy()
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(s, t, strict=True)]
    correlations = [np.corrcoef(s[:, j], t[:, j])[0, 1] for j in range(4)]
    assert found["student_norm"].item() == pytest.approx(np.linalg.norm(s, axis=1).mean(), rel=1e-5)
    assert found["row_cosine"].item() == pytest.approx(np.mean(cosines), rel=1e-4)
    mean = t.mean(0)
    constant = [a @ mean / np.linalg.norm(a) / np.linalg.norm(mean) for a in t]
    assert found["constant_cosine"].item() == pytest.approx(np.mean(constant), rel=1e-4)
    assert found["dim_correlation"].item() == pytest.approx(np.mean(correlations), rel=1e-4)
    same = agreement(teacher, teacher)
    assert same["row_cosine"].item() == pytest.approx(1, abs=1e-6)
    assert same["dim_correlation"].item() == pytest.approx(1, abs=1e-6)
    assert agreement(student) == {"student_norm": found["student_norm"]}
