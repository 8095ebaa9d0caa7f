"""The loaders of others read our files: the original's evaluation and MoCo's linear scripts, by their key logic."""

import pytest
import torch
import torchvision

from checkpoints.frozen import load_frozen
from models.backbones import build_backbone
from models.distiller import Distiller
from models.heads import build_head
from models.moco_pretraining import MoCoEncoders
from runtime.store import CHECKPOINT

CLASSIFIER = {"fc.weight", "fc.bias"}


def original_evaluation(path, arch):
    """The trunk's prefix is found by its start, taken off, and what has none is dropped; then torchvision's network
    takes what is left, not strictly, and must lack its classifier alone."""
    kept = {}
    for key, value in torch.load(path, map_location="cpu", weights_only=True)["state_dict"].items():
        for prefix in ("module.backbone.", "backbone.", "module.encoder_q."):
            if key.startswith(prefix):
                if not key.startswith("module.encoder_q.fc"):
                    kept[key[len(prefix):]] = value
                break
    return into_torchvision(kept, arch)


def moco_linear_script(path, arch):
    """Only module.encoder_q.* but its fc; everything else is dropped."""
    tensors = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "module.encoder_q."
    return into_torchvision({k[len(prefix):]: v for k, v in tensors.items()
                             if k.startswith(prefix) and not k.startswith(prefix + "fc")}, arch)


def into_torchvision(tensors, arch):
    model = torchvision.models.get_model(arch)
    outcome = model.load_state_dict(tensors, strict=False)
    assert set(outcome.missing_keys) == CLASSIFIER
    assert not outcome.unexpected_keys
    model.fc = torch.nn.Identity()
    return model.eval()


def saved(folder, name, record, tensors):
    """As a run writes it."""
    torch.save({"epoch": 1, "steps": 2, **record, "state_dict": dict(tensors)}, folder / name)
    return folder / name


def move_statistics(module):
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.uniform_(-0.2, 0.2)
    return module


@pytest.fixture(scope="module")
def student():
    trunk = build_backbone("resnet_small", image_size=48)
    return move_statistics(Distiller(trunk, build_head("projection", 128, 64))).eval()


@pytest.fixture(scope="module")
def teacher():
    return move_statistics(MoCoEncoders(build_backbone("resnet_small", image_size=48), moco_dim=8)).eval()


def assert_same_features(model, trunk):
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(model(images), trunk(images))


@pytest.mark.parametrize("wrapped", [False, True])
def test_student(tmp_path, student, wrapped):
    tensors = student.student_state()
    tensors = {f"module.{k}": v for k, v in tensors.items()} if wrapped else tensors
    path = saved(tmp_path, "student.pth", student.record(), tensors)
    assert_same_features(original_evaluation(path, "resnet_small"), student.backbone)
    encoder, report = load_frozen(path, with_head=True)
    assert_same_features(encoder.backbone, student.backbone)
    assert (report.layout, report.dropped, report.epoch) == ("CoSS", {"proj_head.": 4}, 1)
    rows = torch.randn(3, 128)
    assert torch.equal(encoder.head(rows), student.proj_head(rows))


def test_teacher(tmp_path, teacher):
    path = saved(tmp_path, "teacher.pth", teacher.record(), teacher.encoder_state())
    trunk = teacher.trunk().backbone.eval()
    assert_same_features(original_evaluation(path, "resnet_small"), trunk)
    assert_same_features(moco_linear_script(path, "resnet_small"), trunk)
    encoder, report = load_frozen(path, with_head=True)
    assert_same_features(encoder.backbone, trunk)
    assert (report.layout, report.arch, report.branch) == ("MoCo", "resnet_small", "encoder_q")
    assert encoder.head is not None


def test_resume_files_are_read_too(tmp_path, student, teacher):
    """They hold the optimizer, a queue, a momentum student and the random state beside the weights, and the key encoder
    of a teacher."""
    more = {"updater": {"optimizer": {"state": {0: torch.zeros(64, 3, 7, 7)}}}, "random": [torch.zeros(8)],
            "loss": {"losses.disco.queue.items": torch.zeros(4, 4)},
            "momentum": {f"network.{name}": torch.zeros_like(value) for name, value in student.state_dict().items()}}
    path = saved(tmp_path, CHECKPOINT, {**student.record(), **more}, student.state_dict())
    encoder, report = load_frozen(path)
    assert_same_features(encoder.backbone, student.backbone)
    others = len(student.state_dict())
    assert report.dropped == {"proj_head.": 4, "loss.": 1, "updater.": 1, "momentum.": others}
    assert_same_features(original_evaluation(path, "resnet_small"), student.backbone)
    path = saved(tmp_path, CHECKPOINT, {**teacher.record(), **more}, teacher.state_dict())
    encoder, report = load_frozen(path)
    assert_same_features(encoder.backbone, teacher.trunk().backbone.eval())
    assert report.branches == ["encoder_k"]


def test_without_a_head_there_is_nothing_else(tmp_path):
    distiller = Distiller(build_backbone("resnet_small", image_size=48), build_head("projection", 128, 128))
    path = saved(tmp_path, "student.pth", distiller.record(), distiller.student_state())
    original_evaluation(path, "resnet_small")
    assert load_frozen(path)[1].dropped == {}


def test_the_oracle_can_fail(tmp_path, student):
    path = saved(tmp_path, "student.pth", {}, {f"net.{k}": v for k, v in student.student_state().items()})
    with pytest.raises(AssertionError):
        original_evaluation(path, "resnet_small")
