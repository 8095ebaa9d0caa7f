"""The frozen teacher stays what it was, bit for bit; its normalisation is torchvision's."""

import copy

import pytest
import torch
from torch import nn
from torchvision import transforms

from checkpoints.frozen import load_frozen, untrained
from models.backbones import build_backbone
from models.distiller import Distiller
from models.heads import build_head
from models.place import place
from models.teachers import Encoder, FrozenEncoder, Normalise
from runtime.errors import UserError


def images(b=4, size=32, seed=1):
    return torch.randint(0, 256, (b, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def state_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


@pytest.fixture
def teacher():
    backbone = build_backbone("shufflenet_small", image_size=32)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    return FrozenEncoder(backbone)


def test_frozen_whatever_is_asked(teacher):
    before = state_of(teacher)
    for ask in (lambda: teacher.train(), lambda: teacher.train(True), lambda: teacher.eval(),
                lambda: nn.ModuleList([teacher]).train()):
        ask()
        assert not any(module.training for module in teacher.modules())
        features = teacher(images())
        assert not features.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert_same(before, teacher.state_dict())


def test_frozen_features_are_those_of_evaluation_mode_and_alone_for_each_image(teacher):
    twin = copy.deepcopy(teacher.backbone)
    twin.eval()
    teacher.train()
    with torch.no_grad():
        expected = twin(Normalise()(images()))
    assert torch.equal(teacher(images()), expected)
    assert torch.allclose(teacher(images())[1:2], teacher(images()[1:2]), atol=1e-5)


def test_a_step_of_the_student_leaves_the_teacher_bit_identical(teacher):
    before = state_of(teacher)
    student = Distiller(build_backbone("shufflenet_small", image_size=32), build_head("projection", 1024, 1024))
    untouched = state_of(student)
    optimizer = torch.optim.SGD([p for p in [*student.parameters(), *teacher.parameters()] if p.requires_grad],
                                0.03, 0.9, weight_decay=1e-4)
    for seed in range(3):
        student.train()
        teacher.train()
        (student(images(seed=seed))[0] - teacher(images(seed=seed))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(before, teacher.state_dict())
    assert all(p.grad is None for p in teacher.parameters())
    moved = [key for key, value in student.state_dict().items() if not torch.equal(value, untouched[key])]
    assert len(moved) > len(untouched) // 2  # the same steps did change the student


def test_normalisation_is_torchvisions():
    tensors = images(3, 17)
    reference = transforms.Compose([transforms.ToTensor(),
                                    transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    expected = torch.stack([reference(transforms.functional.to_pil_image(image)) for image in tensors])
    normalised = Normalise()(tensors)
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised, expected, rtol=0, atol=2e-6)


def test_normalisation_leaves_its_input_and_the_state_dict_alone():
    tensors = images()
    before = tensors.clone()
    floats = tensors.float()
    Normalise()(tensors)
    assert torch.equal(tensors, before)
    assert not Normalise().state_dict()
    assert set(Encoder(build_backbone("resnet18")).state_dict()) == {
        f"backbone.{key}" for key in build_backbone("resnet18").state_dict()}
    assert floats.min() >= 0


@pytest.mark.parametrize("size", [32, 40])
def test_load_frozen_takes_arch_stem_and_size_from_the_file(tmp_path, size):
    trunk = build_backbone("resnet18", "cifar", size)
    path = tmp_path / "student.pth"
    torch.save({**trunk.spec.record(), "state_dict": {f"backbone.{k}": v for k, v in trunk.state_dict().items()}}, path)
    loaded, report = load_frozen(path)
    assert loaded.backbone.spec == trunk.spec
    assert_same(trunk.state_dict(), loaded.backbone.state_dict())
    assert (report.arch, report.stem, report.layout) == ("resnet18", "cifar", "CoSS")
    assert report.matched == len(trunk.state_dict())


def test_load_frozen_finds_the_architecture_of_a_file_that_records_none(tmp_path):
    path = tmp_path / "bare.pth"
    torch.save(build_backbone("resnet18", "cifar", 32).state_dict(), path)
    loaded, report = load_frozen(path)
    assert loaded.backbone.spec.record() == {"arch": "resnet18", "stem": "cifar", "image_size": 32,
                                             "feature": "pool"}
    assert report.ok
    with pytest.raises(UserError, match="resnet34") as caught:
        load_frozen(path, "resnet34", flag="--distill", prefix="--teacher-")
    assert "it fits resnet18 with stem 'cifar'" in str(caught.value)


def test_each_network_is_normalised_its_own_way(tmp_path):
    path = tmp_path / "swav.pth"
    state = build_backbone("resnet18").state_dict()
    torch.save({**state, "projection_head.0.weight": torch.zeros(2, 512), "prototypes.weight": torch.zeros(3, 2)}, path)
    loaded, report = load_frozen(path)
    assert report.layout == "SwAV, DeepCluster-v2"
    assert report.std == [0.228, 0.224, 0.225]
    twin = build_backbone("resnet18")
    twin.load_state_dict(state)
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.228, 0.224, 0.225])
    with torch.no_grad():
        expected = twin.eval()(normalise(images() / 255))
    torch.testing.assert_close(loaded(images()), expected, rtol=1e-4, atol=1e-4)
    loaded, report = load_frozen(path, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1))
    assert (report.mean, report.std) == ([0.5] * 3, [0.25, 0.5, 1])
    torch.testing.assert_close(loaded.normalise(images()), transforms.Normalize([0.5] * 3, [0.25, 0.5, 1])(
        images() / 255), rtol=0, atol=2e-6)


def test_untrained_is_frozen_and_decided_by_the_seed():
    torch.manual_seed(5)
    one = untrained("resnet18", 32)
    torch.manual_seed(5)
    assert_same(one.state_dict(), untrained("resnet18", 32).state_dict())
    assert not any(p.requires_grad for p in one.parameters())
    assert not torch.equal(one.backbone.conv1.weight, untrained("resnet18", 32).backbone.conv1.weight)


def test_answers_are_features_and_its_own_heads_output():
    backbone = build_backbone("squeezenet_small", image_size=32)
    head = nn.Sequential(nn.Linear(512, 7), nn.ReLU(), nn.Linear(7, 3))
    teacher = FrozenEncoder(backbone, head=head)
    features, projected = teacher.targets(images(), ("features", "head"))
    assert torch.equal(features, teacher(images()))
    assert torch.equal(projected, head(features))
    assert not projected.requires_grad
    assert [len(x) for x in (teacher.targets(images(), ()), teacher.targets(images(), ("head",)))] == [0, 1]
    assert teacher.widths() == {"features": 512, "head": 3}
    assert FrozenEncoder(backbone).widths() == {"features": 512}


def test_batch_statistics_are_the_batchs_and_leave_the_running_ones_alone():
    backbone = build_backbone("shufflenet_small", image_size=32)
    twin = copy.deepcopy(backbone).train()
    teacher = FrozenEncoder(backbone)
    plain, before = teacher(images()), state_of(teacher)
    teacher.use_batch_statistics()
    for _ in range(2):  # and again after somebody called train
        with torch.no_grad():
            assert torch.equal(teacher(images()), twin(Normalise()(images())))
        assert_same(before, teacher.state_dict())
        teacher.train()
    assert not torch.allclose(teacher(images()), plain, rtol=1e-3)
    assert not [m for m in teacher.modules() if m.training and not isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("arch", ["resnet18", "shufflenet_small", "vit_ti_16"])
def test_rounded_weights_answer_as_autocast_does_to_the_bit(arch):
    plain = place(FrozenEncoder(build_backbone(arch, image_size=32), head=nn.Linear(192, 7) if "vit" in arch else None),
                  torch.device("cpu"))
    rounded, kinds = copy.deepcopy(plain), ("features", "head") if plain.head else ("features",)
    plain.round(None)
    assert_same(plain.state_dict(), rounded.state_dict())
    rounded.round(torch.bfloat16)
    assert any(value.dtype == torch.bfloat16 for value in rounded.state_dict().values())
    with torch.autocast("cpu", torch.bfloat16):
        for found, expected in zip(rounded.targets(images(), kinds), plain.targets(images(), kinds), strict=True):
            assert torch.equal(found, expected)
