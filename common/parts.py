"""What takes part in a step of train_distill.py: the networks and the loss, and how one step is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoints.report import Report
from common import cli, distillation, methods, sampling
from common.first_step import MeasuredStep
from common.training_data import TrainingData
from data.loader import Batch
from data.samplers import RandomSampler
from losses import build_objective, needs_of
from losses.base import CombinedNeeds, Inputs
from losses.combine import Objective
from models.backbones import check_batch
from models.distiller import Distiller
from models.momentum import MomentumStudent, MovingAverage
from models.teachers import FrozenEncoder
from runtime.device import Process
from runtime.micro_batches import in_parts, parts_of
from runtime.restore import Stateful
from runtime.watch import GrowthWatch


@dataclass
class Parts:
    """What takes part in a step. ``begun`` and ``report``: the files that the student and the teacher come from.
    ``momentum``: the momentum copy of the student that gives targets; ``average``: the one of --ema."""

    loss: Objective
    student: Distiller
    begun: Report | None
    teacher: FrozenEncoder | None
    report: Report | None
    momentum: MomentumStudent | None
    average: MovingAverage | None
    micro_batch: int  # images that pass through the networks at once, 0 for all
    micro_batches: int  # into which a batch is therefore split
    watch: GrowthWatch | None

    def step(self, batch: Batch, forward: Callable[..., tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """A training step: the named parts of the loss. ``forward``: the student's."""
        inputs = self.loss.inputs(batch.views)             # uint8 [b, 3, S, S] each, on the device
        targets = self._targets(inputs)
        outputs = forward(*inputs.student)                 # [b, d] each
        found = self.loss(student=outputs, **targets, **inputs.context)
        logged_head = next((i for i, (_, to) in enumerate(self.loss.needs.heads) if to), 0)  # compared with the teacher
        return {**found, "student": outputs[logged_head].detach(), **{name: x[0] for name, x in targets.items() if x}}

    @torch.no_grad()
    def _targets(self, inputs: Inputs) -> dict[str, tuple[Tensor, ...]]:
        """The targets that the student's outputs are compared with, without gradient, [b, d] each."""
        teacher = in_parts(lambda images: self.teacher.targets(images, self.loss.needs.teacher), self.micro_batch)
        found = {"teacher": tuple(y for x in inputs.teacher for y in teacher(x))}
        if self.momentum:
            self.momentum.update(self.student)
            found["momentum"] = tuple(y for x in inputs.momentum for y in self.momentum(x))
        return found

    def measured_step(self, data: TrainingData) -> MeasuredStep:
        """All forward passes of a step, which change nothing but buffers."""
        def passes(views: Sequence[Tensor]) -> Any:
            inputs = self.loss.inputs(views)
            with torch.no_grad():
                targets = [self.teacher.targets(x, self.loss.needs.teacher) for x in inputs.teacher]
                targets += [self.momentum.network(x) for x in inputs.momentum]
            return targets, self.student(*inputs.student)

        networks = [x for x in (self.student, self.teacher, self.momentum) if x]
        return MeasuredStep(passes, networks, data.views, data.sampler.images_per_step, self.micro_batches,
                            4 if self.loss.needs.pairs else 2)

    def after_update(self) -> None:
        """Move the average of --ema towards the student."""
        if self.average:
            self.average.update(self.student)

    def prepare(self, dtype: torch.dtype | None, compiled: bool) -> None:
        """Before the first step: the teacher's weights rounded to ``dtype``, and the networks ``compiled``."""
        if self.teacher:
            self.teacher.round(dtype)
        for network in filter(None, (self.student, self.teacher, self.momentum and self.momentum.network)):
            if compiled:
                network.compile()

    @property
    def exports(self) -> dict[str, Distiller]:
        """The networks that are saved for use, by the names of their files."""
        return {"student.pth": self.student, **({"student_ema.pth": self.average.network} if self.average else {})}

    @property
    def modules(self) -> dict[str, Stateful]:
        """What a run resumes from, under its names in checkpoint.pth."""
        kept = {"state_dict": self.student, "momentum": self.momentum, "ema": self.average, "watch": self.watch,
                "loss": self.loss if self.loss.state_dict() else None}
        return {name: module for name, module in kept.items() if module is not None}


def build_parts(args: cli.Arguments, data: TrainingData, teacher: FrozenEncoder | None, report: Report | None,
                process: Process) -> tuple[Parts, list[str]]:
    """The networks and the loss, on the device, and notes for the log."""
    needs = needs_of(args.loss)
    widths = {None: args.moco_dim, **(teacher.widths() if teacher else {})}  # of each target of the student
    student, begun = distillation.build_student(args, needs, widths, data.image_size, process)
    parts = micro_batches(args, needs, data.sampler, student, teacher)
    notes = []
    loss = build_objective(args.loss, args.loss_weights, args.beta, widths, **methods.options(args),
                           student_dim=student.backbone.spec.feature_dim).to(process.device)
    if teacher:
        notes += distillation.ready(teacher, process)
        notes += distillation.start_head(args, student, teacher, loss, data)
    momentum = (MomentumStudent(student, args.moco_m, max(args.bn_parts, parts * process.world_size))
                if needs.momentum else None)
    average = MovingAverage(student, args.ema) if args.ema else None
    return Parts(loss, student, begun, teacher, report, momentum, average, args.micro_batch, parts,
                 GrowthWatch() if loss.follows_rows else None), notes


def micro_batches(args: cli.Arguments, needs: CombinedNeeds, sampler: RandomSampler, student: Distiller,
                  teacher: FrozenEncoder | None) -> int:
    """The number of parts into which --micro-batch splits a batch. Raises UserError if batch norm would get too few
    images."""
    rows = sampler.images_per_step // (2 if needs.pairs else 1)
    parts = parts_of(rows, args.micro_batch)
    for network in (student, *([teacher] if teacher and args.teacher_bn == "train" else [])):
        check_batch(network, rows // parts, "--micro-batch" if parts > 1 else
                    "a cluster of --closek-info" if sampling.chosen_sampler(args).uneven_steps else "--batch-size")
    return parts
