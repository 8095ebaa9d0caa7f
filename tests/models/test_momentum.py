"""The momentum student: the moving average itself, its shuffled batch norm, and MoCo's own training beside it."""

import copy

import pytest
import torch
from torch import nn

from losses import build_objective
from losses.moco import MoCo
from models.backbones import build_backbone
from models.distiller import Distiller
from models.heads import build_head, build_heads
from models.moco_pretraining import MoCoEncoders
from models.momentum import MomentumStudent, MovingAverage, follow


def images(b=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (b, 3, 32, 32), dtype=torch.uint8, generator=generator)


def test_follows_by_the_moving_average():
    slow, fast = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    expected = [0.9 * a + 0.1 * b for a, b in zip(slow.parameters(), fast.parameters(), strict=True)]
    follow(slow, fast, 0.9)
    for value, wanted in zip(slow.parameters(), expected, strict=True):
        torch.testing.assert_close(value.data, wanted.data, rtol=1e-14, atol=0)


def test_begins_as_the_student_and_never_trains():
    student = Distiller(build_backbone("shufflenet_small", image_size=32), build_head("mlp", 1024, 8)).double()
    momentum = MomentumStudent(student, 0.9, bn_parts=1)
    assert all(torch.equal(a, b) for a, b in zip(momentum.network.parameters(), student.parameters(), strict=True))
    assert not any(p.requires_grad for p in momentum.parameters())
    output, = momentum(images())
    assert not output.requires_grad
    torch.testing.assert_close(output, student(images())[0], rtol=1e-9, atol=1e-9)  # in one part order plays no part


def test_gives_every_head_of_the_student_in_the_order_of_the_images():
    heads = build_heads((("mlp", "head"), ("none", "features")), 512, {"head": 8, "features": 512})
    student = Distiller(build_backbone("squeezenet_small", image_size=32).eval(), heads)  # no batch norm in it
    for found, expected in zip(MomentumStudent(student, bn_parts=3)(images()), student(images()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("head_bn", "tolerance"), [(False, 1e-6), (True, 1e-3)])
def test_three_steps_are_those_of_train_teachers_moco(head_bn, tolerance):
    """Distiller, momentum student and --loss moco give the losses and the keys of train_teacher.py.

    A fresh network's outputs hardly differ, and batch norm behind them divides by how much: so the second tolerance.
    """
    torch.manual_seed(1)
    whole = MoCoEncoders(build_backbone("shufflenet_small", "cifar", 16), 8, 0.9, 2, head_bn).double()
    whole_loss = MoCo(8, 16)
    head = build_head("mlp", 1024, 8, head_bn)
    student = Distiller(build_backbone("shufflenet_small", "cifar", 16), head).double()
    student.backbone.load_state_dict({k: v for k, v in whole.encoder_q.state_dict().items() if not k.startswith("fc.")})
    student.proj_head.load_state_dict(whole.encoder_q.fc.state_dict())
    momentum = MomentumStudent(student, 0.9, 2)
    loss = build_objective("moco", widths={None: 8}, queue_size=16)
    queue = loss.losses["moco"].queue
    queue.items.copy_(whole_loss.queue.items)
    optimizers = [torch.optim.SGD((p for p in m.parameters() if p.requires_grad), 0.02, 0.9) for m in (whole, student)]
    for step in range(3):
        views = images(8, seed=2 * step), images(8, seed=2 * step + 1)
        torch.manual_seed(step)
        q, k = whole(*views)
        theirs = whole_loss(student=q, momentum=k)
        torch.manual_seed(step)
        inputs = loss.inputs(views)
        momentum.update(student)
        keys = tuple(y for x in inputs.momentum for y in momentum(x))
        ours = loss(student=student(*inputs.student), momentum=keys, **inputs.context)
        for parts, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            parts["loss"].backward()
            optimizer.step()
        assert ours["loss"].item() == pytest.approx(theirs["loss"].item(), rel=tolerance)
        assert ours["accuracy"] == theirs["accuracy"]
        torch.testing.assert_close(queue.items, whole_loss.queue.items, rtol=0, atol=tolerance)


def test_goes_on_from_its_state():
    student = Distiller(build_backbone("shufflenet_small", image_size=32), build_head("mlp", 1024, 8))
    one, two = MomentumStudent(student, 0.5), MomentumStudent(copy.deepcopy(student), 0.5)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    one.update(student)
    one(images())  # moves the running statistics
    two.load_state_dict(one.state_dict())
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key])


def test_parameters_and_running_statistics_move_and_counts_are_taken_over():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last).train()
    average = MovingAverage(network, 0.9)
    expected = {name: value.clone().double() for name, value in network.state_dict().items()}
    for _ in range(3):
        network(torch.randn(5, 3, 6, 6))
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))
        average.update(network)
        for name, value in network.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value.double()
    for name, value in average.network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert value == 3
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in average.parameters())
    assert {key.partition(".")[0] for key in average.state_dict()} == {"network"}
