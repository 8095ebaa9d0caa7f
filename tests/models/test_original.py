"""The original's mobile networks beside timm's and torchvision's, which others wrote, with the same tensors in them."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers.sources import randomise
from torch import nn

from checkpoints.conversion import export
from checkpoints.frozen import load_frozen
from checkpoints.targets import Network
from models.backbones import build_backbone
from models.distiller import Distiller
from models.heads import build_head
from models.original import ORIGINALS, build_original, name_there, of_the_paper
from runtime.errors import UserError

SIZE = 96
WIDTHS = {"efficientnet_b0_coss": 1280, "efficientnet_b1_coss": 1280, "efficientnet_b2_coss": 1408,
          "efficientnet_b3_coss": 1536, "mobilenetv3_large": 1280, "mobilenetv3_small": 1024}


@pytest.fixture
def images():
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def largest(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def timm_twin(trunk):
    """timm's port of TensorFlow's network, which has the same tensors in the same order."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("tf_" + name_there(trunk.spec.arch), num_classes=0, bn_momentum=0.01)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), trunk.state_dict().values(), strict=True)))
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("arch", ["efficientnet_b0_coss", "efficientnet_b3_coss"])
def test_efficientnet_is_tensorflows(arch, images):
    trunk = randomise(build_backbone(arch))
    # B3's padding is laid out for maps of 300 pixels, timm's follows the image
    images = F.interpolate(images, 300) if "b3" in arch else images
    assert largest(trunk(images), timm_twin(trunk).eval()(images)) < 1e-5


@torch.no_grad()
def test_efficientnet_keeps_statistics_as_tensorflow_does(images):
    trunk = randomise(build_backbone("efficientnet_b0_coss"))
    theirs = timm_twin(trunk).train()
    trunk.train()
    for block in trunk._blocks:
        block.drop = 0.0
    trunk._dropout.p = 0.0
    assert largest(trunk(images), theirs(images)) < 1e-4
    for (name, ours), other in zip(trunk.named_buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(ours, other, rtol=1e-4, atol=1e-5), name


def mobilenet_by_hand(trunk, images):
    """torchvision's layers with the tensors of ``trunk``, put together in the original's order."""
    theirs = torchvision.models.get_model(trunk.spec.arch.replace("v3", "_v3"))
    wanted = theirs.state_dict()
    names = [name for name in wanted if not name.startswith("classifier.3")]
    tensors = zip(names, trunk.state_dict().values(), strict=True)
    theirs.load_state_dict({**wanted, **{name: value.reshape(wanted[name].shape) for name, value in tensors}})
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5
    x = theirs.eval().features[0](images)
    for layer in theirs.features[1:-1]:
        y = x
        for part in layer.block[:-1]:
            following = layer.block[list(layer.block).index(part) + 1]
            if len(layer.block) == 4 and isinstance(following, torchvision.ops.SqueezeExcitation):
                y = part[1](part[0](y))  # its activation comes behind squeeze-and-excitation
                y = part[2](following(y))
            elif not (len(layer.block) == 4 and isinstance(part, torchvision.ops.SqueezeExcitation)):
                y = part(y)
        x = x * layer.use_res_connect + layer.block[-1](y) if layer.use_res_connect else layer.block[-1](y)
    return F.hardswish(theirs.classifier[0](theirs.features[-1](x).mean((2, 3))))


@torch.no_grad()
@pytest.mark.parametrize("arch", ["mobilenetv3_large", "mobilenetv3_small"])
def test_mobilenet_is_torchvisions_in_another_order(arch, images):
    trunk = randomise(build_backbone(arch))
    assert largest(trunk(images), mobilenet_by_hand(trunk, images)) < 1e-5


@pytest.mark.parametrize("arch", ORIGINALS)
def test_what_differs_from_torchvisions(arch, images):
    trunk = build_backbone(arch)
    norms = [m for m in trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    expected = (1e-3, 0.01) if "efficient" in arch else (1e-5, 0.1)
    assert {(m.eps, m.momentum) for m in norms} == {expected}
    assert trunk.spec.feature_dim == WIDTHS[arch] == trunk.eval()(images[:1]).shape[1]
    ours = sum(p.numel() for p in trunk.parameters())
    theirs = torchvision.models.get_model(name_there(arch).replace("v3", "_v3"))
    whole = sum(p.numel() for p in theirs.parameters())
    assert ours == whole - WIDTHS[arch] * 1000 - 1000  # the same network but the classifier


def test_features_are_dropped_while_a_student_is_trained(images):
    for arch, share in (("efficientnet_b0_coss", 0.2), ("mobilenetv3_large", 0.2), ("efficientnet_b3_coss", 0.3)):
        zero = (build_backbone(arch).train()(images) == 0).float().mean()
        assert abs(float(zero) - share) < 0.05


def test_initialisation():
    """Uniform up to 1 / sqrt(fan in), PyTorch's own, and He's by the fan out."""
    weight = build_original("efficientnet_b0_coss")._conv_head.weight
    assert 0.99 < float(weight.detach().abs().max()) * weight[0].numel() ** 0.5 <= 1
    network = build_original("mobilenetv3_large")
    weight = network.conv[0].weight
    assert abs(float(weight.detach().std()) * (weight.shape[0] / 2) ** 0.5 - 1) < 0.02
    assert abs(float(network.features[4].conv[5].fc[0].weight.detach().std()) / 0.01 - 1) < 0.1


def test_a_block_that_is_left_out_is_its_skip_connection():
    block = build_original("efficientnet_b0_coss")._blocks[2].train()
    images = torch.randn(64, 24, 8, 8)
    block.drop = 0.5
    left_out = (block(images) == images).flatten(1).all(1).float().mean()
    assert 0.3 < float(left_out) < 0.7


def saved(path, arch, names=lambda name: f"module.backbone.{name}"):
    """A file of the original's training; and the network in it."""
    trunk = randomise(build_original(arch))
    trunk.fc = nn.Identity()
    head = nn.Sequential(nn.Linear(WIDTHS[arch], 2048), nn.ReLU(), nn.Linear(2048, 8))
    state = {**{names(k): v for k, v in trunk.state_dict().items()},
             **{f"module.proj_head.{k}": v for k, v in head.state_dict().items()}}
    torch.save({"epoch": 25, "arch": name_there(arch), "state_dict": state, "optimizer": {}}, path)
    return trunk, head


@torch.no_grad()
@pytest.mark.parametrize("arch", ["efficientnet_b0_coss", "efficientnet_b1_coss", "mobilenetv3_large",
                                  "mobilenetv3_small"])
def test_files_of_the_original_are_read(tmp_path, arch, images):
    trunk, head = saved(tmp_path / "o.pth.tar", arch)
    encoder, report = load_frozen(tmp_path / "o.pth.tar", with_head=True)
    assert (report.arch, report.layout, report.notes) == (arch, "CoSS", [])
    assert torch.equal(encoder.backbone(images), trunk(images))
    assert torch.equal(encoder.head(encoder.backbone(images)), head(trunk(images)))


@torch.no_grad()
@pytest.mark.parametrize(("layout", "prefix", "other"), [
    ("SEED", "module.student.", "module.teacher."), ("MoCo", "module.encoder_q.", "module.encoder_k."),
    ("DisCo", "module.encoder_q.", "module.teacher_encoder_q.")])
@pytest.mark.parametrize("arch", ["efficientnet_b0_coss", "mobilenetv3_large", "mobilenetv3_small"])
def test_files_of_the_methods_that_it_builds_on_are_read(tmp_path, arch, layout, prefix, other, images):
    """Their MLP stands in place of the network's last layer, behind MobileNetV3's hidden one."""
    trunk = randomise(build_original(arch))
    trunk.fc = nn.Identity()
    head = nn.Sequential(nn.Linear(WIDTHS[arch], 16), nn.ReLU(), nn.Linear(16, 8))
    state = {f"{prefix}{k}": v for k, v in trunk.state_dict().items()}
    state |= {f"{prefix}fc.{k}": v for k, v in head.state_dict().items()}
    state |= {f"{other}conv1.weight": torch.ones(64, 3, 7, 7), "module.queue": torch.ones(8, 4)}
    torch.save({"epoch": 1, "arch": name_there(arch), "state_dict": state}, tmp_path / "o.pth.tar")
    encoder, report = load_frozen(tmp_path / "o.pth.tar", with_head=True)
    assert (report.arch, report.layout) == (arch, layout)
    assert torch.equal(encoder.backbone(images), trunk(images))
    assert torch.equal(encoder.head(encoder.backbone(images)), head(trunk(images)))


def test_files_under_the_packages_name_for_the_classifier(tmp_path):
    network = randomise(build_original("efficientnet_b0_coss"))
    state = {("_" + k if k.startswith("fc.") else k): v for k, v in network.state_dict().items()}
    torch.save(state, tmp_path / "efficientnet-b0.pth")
    assert load_frozen(tmp_path / "efficientnet-b0.pth")[1].arch == "efficientnet_b0_coss"


def test_torchvisions_network_is_not_taken_for_it(tmp_path):
    saved(tmp_path / "o.pth.tar", "efficientnet_b0_coss")
    with pytest.raises(UserError, match="does not fit efficientnet_b0 .* it fits efficientnet_b0_coss .*so give that"):
        load_frozen(tmp_path / "o.pth.tar", "efficientnet_b0")
    state = torchvision.models.efficientnet_b0().state_dict()
    torch.save(state, tmp_path / "t.pth")
    assert load_frozen(tmp_path / "t.pth")[1].arch == "efficientnet_b0"


def test_a_student_has_the_originals_names():
    student = Distiller(build_backbone("mobilenetv3_large"), build_head("projection", 1280, 2048))
    original = build_original("mobilenetv3_large")
    original.fc = nn.Identity()
    names = [f"backbone.{name}" for name in original.state_dict()]
    assert list(student.student_state())[:len(names)] == names


@pytest.mark.parametrize("to, file", [("timm", "x.pth"), ("safetensors", "x.safetensors")])
def test_export(tmp_path, to, file, images):
    pytest.importorskip(to)
    saved(tmp_path / "o.pth.tar", "efficientnet_b0_coss")
    network = Network.of(*load_frozen(tmp_path / "o.pth.tar"))
    assert export(network, to, tmp_path / file, {"random": images}).difference < 1e-5


@pytest.mark.parametrize("to", ["torchvision", "moco"])
def test_export_to_what_is_torchvisions_is_refused(tmp_path, to, images):
    saved(tmp_path / "o.pth.tar", "efficientnet_b0_coss")
    network = Network.of(*load_frozen(tmp_path / "o.pth.tar"))
    with pytest.raises(UserError, match="torchvision's network of that name is a different one"):
        export(network, to, tmp_path / "x.pth", {"random": images})


@pytest.mark.parametrize("arch", ["efficientnet_b0", "efficientnet_b0_coss", "resnet18"])
def test_a_row_of_the_paper_is_named(arch):
    assert ("the paper's row is efficientnet_b0_coss" in of_the_paper(arch)) is (arch == "efficientnet_b0")
