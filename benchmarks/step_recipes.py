"""The recipes that benchmarks/train_step.py compares: a step of CoSS as it is usually written, and this project's."""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.batches import Batch  # noqa: E402
from data.loader import TrainingLoader  # noqa: E402
from losses import build_objective  # noqa: E402
from models.backbones import build_backbone  # noqa: E402
from models.distiller import Distiller  # noqa: E402
from models.heads import build_head  # noqa: E402
from models.place import place  # noqa: E402
from models.teachers import FrozenEncoder, Normalise  # noqa: E402
from runtime.micro_batches import in_parts  # noqa: E402
from runtime.optim import Updater  # noqa: E402
from runtime.optimizers import build_optimizer  # noqa: E402

STAGES = ("data", "teacher", "student", "loss", "backward", "optimizer", "waiting")
MEANS = ("amp", "channels_last", "place", "fold", "round", "fused", "ahead")  # that --each leaves out
DTYPES = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Stopwatch:
    """Seconds between marks: of the device where there is one, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def mark(self, stage: str) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((stage, event))
        else:
            self.marks.append((stage, time.process_time()))

    def seconds(self) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float)
        for (_, start), (stage, end) in itertools.pairwise(self.marks):
            total[stage] += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
        self.marks = []
        total.pop("start", None)
        return dict(total)


class Reference:
    """The step as it is usually written."""

    def __init__(self, networks: tuple[nn.Module, nn.Module], images: list[Tensor], device: torch.device, amp: str,
                 ) -> None:
        teacher, student = networks
        self.teacher = teacher.backbone.to(device).eval()
        self.student = nn.Sequential(student.backbone, student.proj_head).to(device).train()
        normalise = Normalise()
        self.images = [normalise(x).contiguous() for x in images]                    # float32, on the host
        self.images = [x.pin_memory() for x in self.images] if device.type == "cuda" else self.images
        self.optimizer = torch.optim.SGD(self.student.parameters(), 1e-4, 0.9, weight_decay=1e-4)
        amp = amp if device.type == "cuda" else "off"
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self.device, self.dtype, self.watch = device, DTYPES[amp], Stopwatch(device)

    def run(self, steps: int) -> None:
        watch = self.watch
        watch.mark("start")
        for step in range(steps):
            images = self.images[step % len(self.images)].to(self.device, non_blocking=True)
            watch.mark("data")
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                with torch.no_grad():
                    t = self.teacher(images)
                watch.mark("teacher")
                s = self.student(images)
                watch.mark("student")
                loss = self.dot(t, s).mean() + self.dot(t.T, s.T).mean()
            watch.mark("loss")
            self.scaler.scale(loss).backward()
            watch.mark("backward")
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            watch.mark("optimizer")
            loss.item()
            watch.mark("waiting")

    @staticmethod
    def dot(t: Tensor, s: Tensor) -> Tensor:
        return -(F.normalize(t, dim=-1) * F.normalize(s, dim=-1)).sum(-1) / (0.07 * 0.1)


class Ours:
    """The step of train_distill.py, by the modules that it is made of. ``without``: one of MEANS, left out."""

    def __init__(self, networks: tuple[nn.Module, nn.Module], images: list[Tensor], device: torch.device, amp: str,
                 without: str = "", micro_batch: int = 0, compiled: bool = False) -> None:
        if without != "fold":
            networks[0].fold()
        self.teacher, self.student = (self.on(device, network, without) for network in networks)
        self.student.train()
        for network in (self.teacher, self.student) if compiled else ():
            network.compile()
        self.loss = build_objective("coss")
        optimizer = build_optimizer("sgd", self.student.parameters(), 1e-4, 0.9, 1e-4)
        if without == "fused":
            optimizer = torch.optim.SGD(self.student.parameters(), 1e-4, 0.9, weight_decay=1e-4)
        self.updater, self.watch = Updater(optimizer, device, "off" if without == "amp" else amp), Stopwatch(device)
        if without != "round":
            self.teacher.round(self.updater.dtype)
        optimizer.register_step_pre_hook(lambda *_: self.watch.mark("backward"))
        self.forward = self.updater.in_micro_batches(self.student, micro_batch)
        self.targets = in_parts(lambda x: self.teacher.targets(x, ("features",)), micro_batch)
        images = [x.pin_memory() for x in images] if device.type == "cuda" else images      # uint8, on the host
        self.batches = [Batch((x,), torch.arange(len(x)), []) for x in images]
        self.device, self.ahead = device, without != "ahead"

    @staticmethod
    def on(device: torch.device, network: nn.Module, without: str) -> nn.Module:
        if without in ("channels_last", "place"):
            layout = torch.contiguous_format if without == "channels_last" else torch.channels_last
            return network.to(device, memory_format=layout)
        return place(network, device)

    def run(self, steps: int) -> None:
        watch = self.watch
        watch.mark("start")
        for batch in self.given(steps):
            watch.mark("data")
            with self.updater.autocast():
                inputs = self.loss.inputs(batch.views)
                targets = tuple(y for x in inputs.teacher for y in self.targets(x))
                watch.mark("teacher")
                outputs = self.forward(*inputs.student)
                watch.mark("student")
                parts = self.loss(student=outputs, teacher=targets, **inputs.context)
            watch.mark("loss")
            self.updater.step(parts["loss"], 1e-4)
            watch.mark("optimizer")

    def given(self, steps: int) -> Iterator[Batch]:
        batches = [self.batches[step % len(self.batches)] for step in range(steps)]
        if self.ahead:
            yield from TrainingLoader(batches, self.device)
        else:
            yield from (batch._replace(views=tuple(x.to(self.device, non_blocking=True) for x in batch.views))
                        for batch in batches)


@functools.cache
def random_networks(teacher: str, student: str, image_size: int) -> tuple[FrozenEncoder, Distiller]:
    """Teacher and student, not to be changed; the teacher's statistics are those of random images, so that its numbers
    stay within fp16."""
    torch.manual_seed(0)
    trunk = build_backbone(teacher, image_size=image_size).train()
    for module in trunk.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        trunk(Normalise()(random_images(16, image_size)))
    student = build_backbone(student, image_size=image_size)
    head = build_head("projection", student.spec.feature_dim, trunk.spec.feature_dim)
    return FrozenEncoder(trunk), Distiller(student, head)


def random_images(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
