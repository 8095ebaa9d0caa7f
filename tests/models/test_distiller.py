"""The student: a projection only where widths differ, the original's key names, beta on the whole loss."""

import copy

import pytest
import torch
from torch import nn

from losses.coss import CoSS
from models.backbones import build_backbone
from models.distiller import Distiller, agreement, projection_head
from models.teachers import Normalise


def images(b=4, size=32):
    return torch.randint(0, 256, (b, 3, size, size), dtype=torch.uint8)


def test_no_projection_between_equal_widths():
    head = projection_head(512, 512)
    assert not list(head.parameters())
    x = torch.randn(3, 512)
    assert torch.equal(head(x), x)


@pytest.mark.parametrize(("student", "teacher"), [(512, 2048), (2048, 512), (1280, 1281)])
def test_projection_is_linear_relu_linear_through_2048(student, teacher):
    head = projection_head(student, teacher)
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == {
        "0.weight": (2048, student), "0.bias": (2048,), "2.weight": (teacher, 2048), "2.bias": (teacher,)}
    x, (w0, b0, w2, b2) = torch.randn(3, student), head.state_dict().values()
    expected = (x @ w0.T + b0).clamp_min(0) @ w2.T + b2
    torch.testing.assert_close(head(x.clone()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("teacher_dim", [512, 640])
def test_forward_is_trunk_projection_loss(teacher_dim):
    backbone = build_backbone("squeezenet1_1", image_size=32)
    student = Distiller(backbone, teacher_dim, CoSS(1.0, 0.5))
    batch, target = images(), torch.randn(4, teacher_dim)
    parts = student(batch, target)
    features = student.proj_head(backbone(Normalise()(batch)))
    expected = CoSS(1.0, 0.5)(student=features, teacher=target)
    assert torch.equal(parts["student"], features.detach())
    assert not parts["student"].requires_grad
    assert parts["loss"].requires_grad
    assert torch.equal(parts["loss"], expected["loss"])
    assert torch.equal(parts["row"], expected["row"])


def test_beta_scales_the_loss_and_its_gradient_but_not_the_parts():
    backbone = build_backbone("squeezenet1_1", image_size=32)
    batch, target = images(), torch.randn(4, 512)
    parts, gradients = [], []
    for beta in (1.0, 0.25):
        student = Distiller(copy.deepcopy(backbone), 512, CoSS(), beta)
        parts.append(student(batch, target))
        parts[-1]["loss"].backward()
        gradients.append(student.backbone.features[0].weight.grad)
    assert parts[1]["loss"].item() == pytest.approx(0.25 * parts[0]["loss"].item(), rel=1e-6)
    assert torch.equal(parts[0]["row"], parts[1]["row"])
    torch.testing.assert_close(gradients[1], 0.25 * gradients[0], rtol=1e-4, atol=1e-6)


class LossWithTensors(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(3))

    def forward(self, *, student, teacher):
        return {"loss": (student - teacher).square().mean()}


def test_state_keys_are_the_originals():
    backbone = build_backbone("resnet18", image_size=32)
    trunk = {f"backbone.{key}" for key in backbone.state_dict()}
    head = {f"proj_head.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    student = Distiller(backbone, 2048, LossWithTensors())
    assert set(student.state_dict()) == trunk | head | {"loss.queue"}
    assert set(student.student_state()) == trunk | head
    assert set(Distiller(build_backbone("resnet18"), 512, CoSS()).state_dict()) == trunk
    assert student.record() == {"arch": "resnet18", "stem": "imagenet", "image_size": 32,
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
    assert found["dim_correlation"].item() == pytest.approx(np.mean(correlations), rel=1e-4)
    same = agreement(teacher, teacher)
    assert same["row_cosine"].item() == pytest.approx(1, abs=1e-6)
    assert same["dim_correlation"].item() == pytest.approx(1, abs=1e-6)
