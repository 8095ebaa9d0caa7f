"""Within a step the host never waits for the GPU, by CUDA's own check: it raises at the first synchronisation."""

import pytest
import torch

from losses import LOSSES, build_objective, needs_of
from models.backbones import build_backbone
from models.distiller import Distiller, agreement
from models.heads import build_head, build_heads, width_of
from models.momentum import MomentumStudent
from models.teachers import FrozenEncoder
from runtime.optim import Updater
from runtime.optimizers import build_optimizer


@pytest.fixture
def watched(device):
    """Turns CUDA's check on where there is one."""
    if device.type == "cuda":
        yield lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default")
        torch.cuda.set_sync_debug_mode("default")
    else:
        yield lambda on: None


@pytest.mark.parametrize("amp", ["fp16", "bf16", "off"])
@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_makes_the_host_wait(name, amp, device, watched):
    if amp == "fp16" and device.type == "cpu":
        pytest.skip("fp16 needs a GPU")
    needs = needs_of(name)
    trunk, own = build_backbone("resnet18", "cifar", 32), build_backbone("shufflenet_v2_x0_5", "cifar", 32)
    teacher = FrozenEncoder(trunk)
    teacher.head = build_head("projection", trunk.spec.feature_dim, 16).requires_grad_(False)
    widths = {None: 16, "features": trunk.spec.feature_dim, "head": width_of(teacher.head, trunk.spec.feature_dim)}
    head = build_heads(needs.heads, own.spec.feature_dim, widths, False)
    student = Distiller(own, head).to(device, memory_format=torch.channels_last)
    momentum = MomentumStudent(student, 0.99, 2) if needs.momentum else None
    teacher.fold()
    teacher = teacher.to(device, memory_format=torch.channels_last)
    loss = build_objective(name, widths=widths, student_dim=own.spec.feature_dim, queue_size=32).to(device)
    updater = Updater(build_optimizer("sgd", student.parameters(), 0.01, 0.9, 1e-4), device, amp)
    views = [torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8).to(device) for _ in range(needs.views)]

    def step():
        with updater.autocast():
            inputs = loss.inputs(views)
            with torch.no_grad():
                found = {}
                if needs.teacher:
                    found["teacher"] = tuple(y for x in inputs.teacher for y in teacher.targets(x, needs.teacher))
                if momentum:
                    momentum.update(student)
                    found["momentum"] = tuple(y for x in inputs.momentum for y in momentum(x))
            outputs = student(*inputs.student)
            parts = loss(student=outputs, **found, **inputs.context)
        updater.step(parts["loss"], 0.01)
        agreement(outputs[0].detach(), found.get("teacher", (None,))[0])
        return parts["loss"]

    step()  # cuDNN's choice, the optimizer's state, the scaler's scale
    watched(True)
    found = step()
    watched(False)
    assert torch.isfinite(found)
