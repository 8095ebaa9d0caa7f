"""MoCo v2 against explicit loops in float64, its momentum encoder, queue and shuffled batch norm."""

import copy
import hashlib
import math
from pathlib import Path

import pytest
import torch
from helpers.scripts import script, well
from torch import nn

import train_teacher
from checkpoints.reader import read_checkpoint
from losses.moco import MoCo
from models.backbones import Spec, build_backbone
from models.moco_pretraining import MoCoEncoders
from models.teachers import Normalise
from runtime.device import Process
from runtime.errors import UserError

DIM = 6


class Pixels(nn.Module):
    """A trunk without batch norm, small enough to follow by hand: the mean colour of four quarters."""

    def __init__(self, batch_norm=False):
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Identity()
        self.norm = nn.BatchNorm1d(12) if batch_norm else nn.Identity()
        self.mix = nn.Linear(12, 12)
        self.spec = Spec("resnet18", "imagenet", 8, 12, "fc")

    def forward(self, images):
        return self.fc(self.mix(self.norm(self.pool(images).flatten(1))))


def views(b, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (b, 3, 8, 8), dtype=torch.uint8, generator=generator) for _ in range(2)]


def make(batch_norm=False, **options):
    moco = MoCoEncoders(Pixels(batch_norm), DIM, **options)
    with torch.no_grad():  # so that the two encoders differ
        for p in moco.encoder_k.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return moco


def train(moco, loss, query, key):
    """The parts of a step of train_teacher.py."""
    q, k = moco(query, key)
    return loss(student=q, momentum=k)


def info_nce(q, k, queue, temperature):
    """Algorithm 1 of MoCo element by element: (loss, share of rows whose positive scores highest)."""
    losses, hits = [], 0
    for i in range(len(q)):
        scores = [math.fsum(a * b for a, b in zip(q[i], k[i], strict=True)) / temperature]
        for j in range(len(queue[0])):
            scores.append(math.fsum(q[i][c] * queue[c][j] for c in range(len(q[i]))) / temperature)
        top = max(scores)
        losses.append(top + math.log(math.fsum(math.exp(s - top) for s in scores)) - scores[0])
        hits += scores[0] > max(scores[1:])
    return math.fsum(losses) / len(losses), hits / len(losses)


def encode(encoder, images):
    encoder = copy.deepcopy(encoder).double()
    normalised = ((images.double() / 255) - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        z = encoder(normalised)
    return [[value / math.sqrt(math.fsum(v * v for v in row)) for value in row] for row in z.tolist()]


@pytest.mark.parametrize("b", [1, 2, 7, 16])
@pytest.mark.parametrize("temperature", [0.2, 0.07])
def test_loss_is_infonce(b, temperature):
    moco, objective = make(moco_m=0.9), MoCo(DIM, 32, temperature)
    query, key = views(b)
    queue = objective.queue.items.double().T.tolist()
    averaged = copy.deepcopy(moco.encoder_k)  # keys come from the encoder after its update
    with torch.no_grad():
        for p, other in zip(averaged.parameters(), moco.encoder_q.parameters(), strict=True):
            p.copy_(0.9 * p + 0.1 * other)
    loss, accuracy = info_nce(encode(moco.encoder_q, query), encode(averaged, key), queue, temperature)
    parts = train(moco, objective, query, key)
    assert parts["loss"].item() == pytest.approx(loss, abs=1e-5)
    assert parts["accuracy"].item() == pytest.approx(accuracy, abs=1e-6)
    assert loss > 0


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999, 1.0])
def test_momentum_update(momentum):
    moco = make(moco_m=momentum)
    before = [p.clone() for p in moco.encoder_k.parameters()]
    moco(*views(4))
    for old, query, new in zip(before, moco.encoder_q.parameters(), moco.encoder_k.parameters(), strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * query, rtol=1e-5, atol=1e-7)
        assert not new.requires_grad


def test_only_the_query_encoder_learns():
    moco = make()
    train(moco, MoCo(DIM, 10), *views(4))["loss"].backward()
    assert all(p.grad is not None for p in moco.encoder_q.parameters())
    assert all(p.grad is None for p in moco.encoder_k.parameters())


def test_the_encoders_begin_equal():
    moco = MoCoEncoders(Pixels(), DIM)
    for a, b in zip(moco.encoder_q.parameters(), moco.encoder_k.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def test_queue_is_a_ring():
    moco, loss = make(moco_m=1.0), MoCo(DIM, 10)  # the key encoder stands still
    expected = loss.queue.items.tolist()
    torch.testing.assert_close(loss.queue.items.norm(dim=1), torch.ones(10))
    place = 0
    for step in range(7):  # batches of 4 in a ring of 10: wraps within a batch
        query, key = views(4, seed=step)
        keys = encode(moco.encoder_k, key)
        train(moco, loss, query, key)
        for row in keys:
            expected[place] = row
            place = (place + 1) % 10
        assert loss.queue.count % 10 == place
        torch.testing.assert_close(loss.queue.items, torch.tensor(expected), rtol=0, atol=1e-5)


def test_logits_use_the_queue_before_the_batch_enters_it():
    moco, loss = make(moco_m=1.0), MoCo(DIM, 4)
    same = views(4)[0]
    moco.encoder_k.load_state_dict(moco.encoder_q.state_dict())
    first = train(moco, loss, same, same)["loss"].item()
    second = train(moco, loss, same, same)["loss"].item()  # now each positive stands in the queue as a negative too
    assert second > first
    assert second >= math.log(2) - 1e-4


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 100])
def test_keys_come_back_in_the_order_of_their_images(parts):
    moco = make(bn_parts=parts, moco_m=1.0)
    key = views(13)[1]
    expected = moco.encoder_k(Normalise()(key))
    for seed in range(3):
        torch.manual_seed(seed)
        torch.testing.assert_close(moco.encode_keys(key), expected, rtol=1e-5, atol=1e-6)


def test_key_statistics_are_taken_over_parts_of_a_shuffled_batch():
    """Each part is normalised by itself: no image's key may be that of the whole batch's statistics."""
    moco = make(batch_norm=True, bn_parts=4, moco_m=1.0).train()
    key = views(16)[1]
    seen = []
    moco.encoder_k.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    moco.encode_keys(key)
    assert [len(part) for part in seen] == [4, 4, 4, 4]
    pooled = moco.encoder_k.pool(Normalise()(key)).flatten(1)
    order = [int((pooled - row).abs().sum(1).argmin()) for part in seen for row in part]
    assert sorted(order) == list(range(16))  # every image once
    assert order != list(range(16))  # and not as the query batch has them


@pytest.mark.parametrize("b", [2, 3, 8, 9, 25, 57])
def test_no_part_is_too_small_for_batch_norm(b):
    """One image has no variance: torch refuses it where the last maps are 1 x 1."""
    moco = make(batch_norm=True, bn_parts=8, moco_m=1.0).train()
    sizes = []
    moco.encoder_k.norm.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    moco.encode_keys(views(b)[1])
    assert sum(sizes) == b
    assert min(sizes) >= 2


TWO_PROCESSES = """
import sys
import torch
sys.path[:0] = [{root!r}, {root!r} + "/tests", {here!r}]
from test_moco import DIM, make, train, views
from losses.moco import MoCo
from models.teachers import Normalise
from runtime.device import start_process, wrap

torch.set_num_threads(1)
with start_process("cpu") as process:
    torch.manual_seed(0)
    moco, whole, loss, whole_loss = make(moco_m=0.9), make(moco_m=0.9), MoCo(DIM, 14), MoCo(DIM, 14)
    whole.load_state_dict(moco.state_dict())
    whole_loss.load_state_dict(loss.state_dict())
    query, key = views(8)
    mine = slice(4 * process.rank, 4 * process.rank + 4)
    torch.manual_seed(100 + process.rank)  # each rank shuffles by its own state, and rank 0's counts
    keys = moco.encode_keys(key[mine])
    plain = moco.encoder_k(Normalise()(key[mine]))
    torch.testing.assert_close(keys, plain, rtol=1e-5, atol=1e-6)

    model = wrap(moco, process)
    for step in range(3):
        query, key = views(8, seed=step)
        train(model, loss, query[mine], key[mine])["loss"].backward()
for step in range(3):  # and the same by one process
    query, key = views(8, seed=step)
    train(whole, whole_loss, query, key)["loss"].backward()
torch.testing.assert_close(loss.queue.items, whole_loss.queue.items, rtol=1e-5, atol=1e-6)
assert loss.queue.count == whole_loss.queue.count == 24
for a, b in zip(moco.encoder_q.parameters(), whole.encoder_q.parameters(), strict=True):
    assert a.grad.norm() > 0
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
with open({out!r} + f"/{{process.rank}}", "w") as file:
    file.write("well")
"""


def test_two_processes_compute_what_one_does(tmp_path):
    """Keys in order, one queue, and the gradient of the whole batch, with encoders free of batch norm."""
    here = Path(__file__).resolve().parent
    program = tmp_path / "two.py"
    program.write_text(TWO_PROCESSES.format(root=str(here.parent.parent), here=str(here), out=str(tmp_path)))
    well(script(program, processes=2))
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["well", "well"]


def test_state_has_the_names_of_mocos_files_and_loads_back(tmp_path):
    backbone = build_backbone("shufflenet_small", "cifar", 16)
    trunk_names = set(backbone.state_dict())
    moco = MoCoEncoders(backbone, moco_dim=16, bn_parts=1).train()
    images = [torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8) for _ in range(2)]
    moco(*images)
    assert {key.partition(".")[0] for key in moco.state_dict()} == {"encoder_q", "encoder_k"}
    path = tmp_path / "teacher.pth"
    torch.save({**moco.record(), "state_dict": moco.encoder_state()}, path)
    head = {f"module.encoder_q.fc.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(moco.encoder_state()) == head | {f"module.encoder_q.{key}" for key in trunk_names}
    assert moco.encoder_state()["module.encoder_q.fc.0.weight"].shape == (1024, 1024)
    assert moco.encoder_state()["module.encoder_q.fc.2.weight"].shape == (16, 1024)
    loaded = build_backbone(**moco.spec.record())
    read_checkpoint(path).load_into(loaded)
    random = torch.get_rng_state()
    trunk = moco.trunk()
    assert torch.equal(torch.get_rng_state(), random)  # looking changes nothing
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, trunk.backbone.state_dict()[key])
        assert torch.equal(value, moco.encoder_q.state_dict()[key])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(Normalise()(images[0])), trunk.eval()(images[0]))
    full = tmp_path / "checkpoint.pth"  # the file to resume from is a teacher too
    torch.save({**moco.record(), "state_dict": moco.state_dict()}, full)
    assert read_checkpoint(full).load_into(build_backbone(**moco.spec.record())).matched == len(trunk_names)


@pytest.mark.parametrize("arch", ["squeezenet_small", "mobilenet_v3_small"])
def test_other_families_can_be_pre_trained(arch):
    moco = MoCoEncoders(build_backbone(arch, image_size=32), moco_dim=8, bn_parts=1).train()
    images = [torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8) for _ in range(2)]
    loss = train(moco, MoCo(8, 8), *images)["loss"]
    loss.backward()
    assert math.isfinite(loss.item())
    assert moco.trunk()(images[0]).shape == (4, moco.spec.feature_dim)


def test_a_frozen_trunk_keeps_every_tensor_and_its_head_learns():
    """Batch norm's statistics too; and the images are normalised as the trunk was trained."""
    colours = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.25, 0.5)}
    moco = make(batch_norm=True, bn_parts=1, freeze_trunk=True, **colours).train()
    before, loss = copy.deepcopy(moco.state_dict()), MoCo(DIM, 10)
    assert torch.equal(moco.normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten(),
                       torch.tensor([1.0, 2.0, 1.0]))
    optimizer = torch.optim.SGD([p for p in moco.parameters() if p.requires_grad], 0.1)
    for seed in range(2):
        train(moco, loss, *views(6, seed))["loss"].backward()
        optimizer.step()
    moco.eval().train()
    moco(*views(6))
    same = {name for name, value in moco.state_dict().items() if torch.equal(value, before[name])}
    trunk = {f"encoder_{x}.{name}" for x in "qk" for name in Pixels(True).state_dict()}
    assert {name for name in moco.state_dict() if name.startswith("encoder_q.")} & same == {
        name for name in trunk if name.startswith("encoder_q.")}
    assert {name for name in same if name.startswith("encoder_k.")} == {
        name for name in trunk if name.startswith("encoder_k.") and "mix" not in name and "norm.weight" not in name
        and "norm.bias" not in name}  # make() has moved the others, so that they follow the query's
    assert moco.record()["std"] == [0.5, 0.25, 0.5]


def test_training_begins_with_the_weights_of_a_file(tmp_path):
    """Architecture, stem and colours are the file's; its trunk is the network's, its head is not."""
    source = MoCoEncoders(build_backbone("shufflenet_small", "cifar", 16), 16, mean=(0.5, 0.5, 0.5),
                          std=(0.5, 0.5, 0.5))
    path = tmp_path / "teacher.pth"
    torch.save({**source.record(), "state_dict": source.encoder_state()}, path)
    words = ["--data", "d", "--output", "o", "--moco-k", "8", "--moco-dim", "4", "--weights", str(path)]
    moco, report = train_teacher.build_moco(train_teacher.parse_args([*words, "--freeze-trunk"]), 16)
    assert (moco.record() | {"image_size": 16}) == source.record()
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    learning = {name for name, value in moco.encoder_q.named_parameters() if value.requires_grad}
    assert learning == {f"fc.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    for name, value in build_backbone("shufflenet_small", "cifar", 16).state_dict().items():
        assert value.shape == moco.encoder_q.state_dict()[name].shape
        assert torch.equal(moco.encoder_q.state_dict()[name], source.encoder_q.state_dict()[name])
    moco, _ = train_teacher.build_moco(train_teacher.parse_args(words), 16)
    assert all(value.requires_grad for value in moco.encoder_q.parameters())
    assert moco.encoder_q.training


def test_a_random_trunk_is_not_frozen():
    args = train_teacher.parse_args(["--data", "d", "--output", "o", "--freeze-trunk"])
    with pytest.raises(UserError, match="--freeze-trunk leaves nothing to learn .* --weights"):
        train_teacher.pretrain(args, Process(0, 1, torch.device("cpu")))
