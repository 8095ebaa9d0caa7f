"""Parts of a step and of a search on a stand-in for a GPU: every loss with every head that it asks for, the exact
search's tiles, k-means, features of a data set."""

import pytest
import torch
from helpers.stand_in import MEANT, ROOT, StandIn
from torch import nn

from losses import LOSSES, build_objective
from models.backbones import Spec
from models.distiller import Distiller, agreement
from models.heads import build_heads, mlp
from models.momentum import MomentumStudent
from models.teachers import FrozenEncoder
from models.vit import build_vit
from runtime.device import Process
from search.exact import search
from search.features import extract
from search.kmeans import kmeans

CUDA = torch.device("cuda", 0)
WIDTH, OWN = 24, 16  # of pooled features, of the teacher's own head


@pytest.fixture
def gpu():
    with StandIn() as device:
        yield device


def trunk(width):
    network = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                            nn.Flatten())
    network.spec = Spec("tiny", "imagenet", 16, width, "")
    return network


def test_the_table_names_functions_that_there_are():
    assert len(MEANT) > 20
    for place in MEANT:
        file, name = place.split(":")
        assert f"def {name}(" in (ROOT / file).read_text(), place


@pytest.mark.parametrize("default", ["cpu", "cuda"], ids="default device {}".format)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name, default, gpu):
    """``default``: what has no device of its own is made there, so that both a device that is missing and one that is
    taken for granted show."""
    needs = LOSSES[name].needs
    with torch.device("cuda"):
        teacher = FrozenEncoder(trunk(WIDTH), head=mlp(WIDTH, WIDTH, OWN))
        widths = {None: OWN, **teacher.widths()}
        loss = build_objective(name, None, 1.0, widths, student_dim=12, queue_size=32)
        student = Distiller(trunk(12), build_heads(loss.needs.heads, 12, widths))
        momentum = MomentumStudent(student, 0.9, 2) if needs.momentum else None
        views = [torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8) for _ in range(needs.views)]
    gpu.waits.clear()
    with torch.device(default), torch.autocast("cuda", torch.float16):
        inputs = loss.inputs(views)
        outputs = student(*inputs.student)
        targets = {"teacher": tuple(y for x in inputs.teacher for y in teacher.targets(x, loss.needs.teacher))}
        if momentum:
            momentum.update(student)
            targets["momentum"] = tuple(y for x in inputs.momentum for y in momentum(x))
        parts = loss(student=outputs, **targets, **inputs.context)
        near = agreement(outputs[0].detach(), targets["teacher"][0] if targets["teacher"] else None)
    assert not gpu.waits
    for value in (*parts.values(), *near.values()):
        assert value.is_cuda and value.ndim == 0 and value.dtype == torch.float32
    assert {x.dtype for x in outputs} <= {torch.float16, torch.float32}
    assert gpu.ops["aten.convolution.default", torch.float16] > 0
    parts["loss"].backward()
    assert all(p.grad is not None for p in student.parameters())


def test_our_vision_transformer(gpu):
    network = build_vit("vit_ti_16", 32).to(CUDA)  # not built there: its truncated normal draws until all fit
    gpu.waits.clear()
    assert network(torch.randn(2, 3, 32, 32, device=CUDA)).is_cuda
    assert not gpu.waits


@pytest.mark.parametrize(("metric", "products"), [("inner", "float32"), ("inner", "tf32"), ("inner", "bf16"),
                                                  ("cosine", "tf32"), ("l2", "bf16"), ("l2", "float32")])
@pytest.mark.parametrize("itself", [True, False])
def test_the_search(itself, metric, products, gpu):
    bank = torch.rand(600, 8, generator=torch.Generator().manual_seed(0))
    queries = None if itself else torch.rand(40, 8)
    for block in search(queries, bank, 3, far=True, metric=metric, products=products, device=CUDA, memory=1 << 22):
        assert not block.near.values.is_cuda and block.near.indices.dtype == torch.int64
    assert not {place for place, _ in gpu.waits} - MEANT


@pytest.mark.parametrize("options", [{}, {"metric": "cosine", "init": "random"}, {"batch_rows": 50}])
def test_kmeans(options, gpu):
    rows = torch.rand(120, 8, generator=torch.Generator().manual_seed(0))
    kmeans(rows, 5, Process(0, 1, CUDA), passes=2, **options)
    assert not [place for place, _ in gpu.waits if place == "runtime/kmeans.py:_plus_plus"]
    assert not {place for place, _ in gpu.waits} - MEANT


def test_features_of_a_data_set(gpu):
    with torch.device("cuda"):
        encoder = FrozenEncoder(trunk(WIDTH))
    gpu.waits.clear()

    def loader_of(indices):
        for part in torch.tensor(indices).split(4):
            yield (torch.zeros(len(part), 3, 16, 16, dtype=torch.uint8).pin_memory(),), part, []

    found = extract(encoder, loader_of, 10, Process(0, 1, CUDA), "features", lambda batch: None)
    assert found.shape == (10, WIDTH) and not found.is_cuda
    assert not {place for place, _ in gpu.waits} - MEANT
