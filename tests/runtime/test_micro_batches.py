"""Two passes over parts of a batch have the loss, gradient, buffers and random numbers of one over all of it."""

import copy

import pytest
import torch
from helpers.ranks import on_ranks
from torch import nn

from losses import LOSSES, build_objective, needs_of
from models.heads import build_heads
from runtime.device import Process, wrap
from runtime.micro_batches import MicroBatches, in_parts, parts_of
from runtime.optim import Updater

CPU = torch.device("cpu")


class TwoHeads(nn.Module):
    """Batches [b, 6] to two outputs each; smooth, with dropout, without batch statistics."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout))
        self.heads = nn.ModuleList([nn.Linear(8, 5), nn.Linear(8, 5)])

    def forward(self, *batches):
        hidden = [self.trunk(x) for x in batches]
        return tuple(head(h) for h in hidden for head in self.heads)


def rows(count, width=6, seed=1):
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def joined(outputs):
    """A scalar in which every row of every output meets every other."""
    everything = torch.cat(outputs)
    return (everything @ everything.T).tanh().sum() + everything.norm()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("count", "size", "parts"), [(8, 8, 1), (8, 9, 1), (8, 4, 2), (7, 4, 2), (7, 3, 3), (9, 2, 5),
                                                      (5, 1, 5), (8, 0, 1), (1, 3, 1)])
def test_parts_are_equal_to_within_one_row(count, size, parts):
    assert parts_of(count, size) == parts
    sizes = [len(part) for part in torch.arange(count).tensor_split(parts)]
    assert sum(sizes) == count
    assert max(sizes) <= (size or count)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_the_gradient_is_that_of_the_whole_batch(size):
    model = TwoHeads().double()
    batches = rows(7), rows(7, seed=2)
    whole = joined(model(*batches))
    whole.backward()
    expected = gradients(model)
    model.zero_grad()
    passes = MicroBatches(model, size)
    loss = joined(passes(*batches))
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    loss.backward()
    passes.backward()
    assert_alike(gradients(model), expected)


def test_a_batch_that_fits_passes_once():
    model = TwoHeads().double()
    passes = MicroBatches(model, 7)
    outputs = passes(rows(7))
    assert all(output.grad_fn is not None for output in outputs)
    joined(outputs).backward()
    expected = gradients(model)
    passes.backward()  # nothing is left to do
    assert_alike(gradients(model), expected)


def test_outputs_that_no_loss_looks_at_have_no_part():
    model = TwoHeads().double()
    model(rows(6))[1].square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    passes = MicroBatches(model, 2)
    passes(rows(6))[1].square().sum().backward()
    passes.backward()
    assert_alike({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)
    assert len(expected) == 4


def test_dropout_draws_the_same_twice_and_what_comes_after_is_not_moved():
    model = TwoHeads(dropout=0.5).double().train()
    torch.manual_seed(5)
    parts = rows(6).split(2)
    outputs = [torch.cat(pieces) for pieces in zip(*(model(part) for part in parts), strict=True)]
    joined(outputs).backward()
    drawn, expected = torch.rand(3), gradients(model)
    model.zero_grad()
    torch.manual_seed(5)
    passes = MicroBatches(model, 2)
    loss = joined(passes(rows(6)))
    loss.backward()
    between = torch.get_rng_state()
    passes.backward()
    assert torch.equal(torch.get_rng_state(), between)
    assert_alike(gradients(model), expected)
    assert torch.equal(torch.rand(3), drawn)


def test_batch_norm_goes_by_a_parts_statistics_and_counts_each_part_once():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).double().train()

    class Tuple(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return (self.inner(x),)

    one, two = Tuple(copy.deepcopy(network)), Tuple(copy.deepcopy(network))
    joined([torch.cat([one(part)[0] for part in rows(6).split(3)])]).backward()
    passes = MicroBatches(two, 3)
    joined(passes(rows(6))).backward()
    passes.backward()
    assert_alike(gradients(two), gradients(one))
    assert two.inner[1].num_batches_tracked == 2
    for name, value in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], value), name


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss(name):
    """The loss's own code between the passes, fed with what it asks for; its parts and the student's gradient."""
    needs = needs_of(name)
    torch.manual_seed(1)
    views = [torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8) for _ in range(needs.views)]
    widths = {None: 5, "features": 5, "head": 5}

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.trunk, self.head = nn.Linear(48, 8), build_heads(needs.heads, 8, widths)

        def forward(self, *images):
            outputs = [self.head(self.trunk(x.flatten(1).double() / 255 - 0.5).tanh()) for x in images]
            return tuple(y for output in outputs for y in ([output] if isinstance(output, torch.Tensor) else output))

    def answers(images):
        return tuple(torch.sin(images.flatten(1).double()[:, :5] + k) for k in range(len(needs.teacher)))

    def given_to(inputs, student, size):
        given = {"teacher": tuple(y for x in inputs.teacher for y in in_parts(answers, size)(x))}
        with torch.no_grad():
            return given | ({"momentum": student(*inputs.momentum)} if needs.momentum else {})

    def one_step(size):
        torch.manual_seed(2)
        student = Student().double()
        loss = build_objective(name, None, 1.0, widths, student_dim=8, queue_size=16, moco_k=16).double()
        loss.set_epoch(20)
        passes = MicroBatches(student, size)
        before = loss.inputs([255 - x for x in views])  # other images: a positive in the queue would tie with itself
        loss(student=student(*before.student), **given_to(before, student, size), **before.context)  # fills queues
        inputs = loss.inputs(views)
        given = given_to(inputs, student, size)
        parts = loss(student=passes(*inputs.student), **given, **inputs.context)
        parts["loss"].backward()
        passes.backward()
        return {k: v.detach() for k, v in parts.items()}, gradients(student)

    parts, expected = one_step(0)
    found, gradient = one_step(3)
    assert_alike(found, parts)
    assert_alike(gradient, expected)
    assert max(value.abs().max() for value in expected.values()) > 0


def on_rank(rank, split, size):
    model = wrap(TwoHeads().double(), Process(rank, len(split), CPU))
    passes, syncs = MicroBatches(model, size), []
    model.register_comm_hook(None, lambda _, bucket: counted(syncs, bucket))
    mine = rows(sum(split)).split(split)[rank]
    joined(passes(mine)).backward()
    passes.backward()
    return {name: p.grad.numpy() for name, p in model.module.named_parameters()}, len(syncs)


def counted(syncs, bucket):
    """What DistributedDataParallel does by itself, and that it was done."""
    syncs.append(1)
    mean = bucket.buffer() / torch.distributed.get_world_size()
    return torch.distributed.all_reduce(mean, async_op=True).get_future().then(lambda done: done.value()[0])


def test_two_processes_exchange_gradients_once(tmp_path):
    split = (6, 5)
    model = TwoHeads().double()
    for part in rows(11).split(split):
        (joined(model(part)) / 2).backward()
    expected = gradients(model)
    for found, syncs in on_ranks(2, on_rank, tmp_path, split, 2):
        assert syncs == 1
        assert_alike({name: torch.from_numpy(value) for name, value in found.items()}, expected)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_updater_runs_the_second_pass(amp):
    """A whole step, mixed precision included: what the loss sees and what the weights become."""
    ends = []
    for size in (0, 2):
        model = TwoHeads()
        updater = Updater(torch.optim.SGD(model.parameters(), 0.1, 0.9), CPU, amp)
        forward = updater.in_micro_batches(model, size)
        assert (forward is model) == (size == 0)
        for seed in range(3):
            with updater.autocast():
                outputs = forward(rows(6, seed=seed).float())
                assert outputs[0].dtype == (torch.bfloat16 if amp == "bf16" else torch.float32)
                loss = joined([x.float() for x in outputs])
            updater.step(loss, 0.1)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    tolerance = 1e-5 if amp == "off" else 0.02
    torch.testing.assert_close(ends[0], ends[1], rtol=tolerance, atol=tolerance)


def test_parts_of_what_needs_no_gradient():
    def function(batch):
        seen.append(len(batch))
        return batch.sum(1), batch * 2

    seen, batch = [], rows(7)
    total, double = in_parts(function, 3)(batch)
    assert seen == [3, 2, 2]
    assert torch.equal(total, batch.sum(1))
    assert torch.equal(double, batch * 2)
    assert in_parts(function, 0) is function
