"""A trunk gives what torchvision's own classifier puts into its first classifier layer, for every family."""

import inspect

import pytest
import torch
import torchvision
from torch import nn

from models.backbones import _names_in_source, arch_names, attach_head, build_backbone, check_arch
from models.original import ORIGINALS
from models.vit import VITS
from runtime.errors import UserError

# architecture, image size, width of the features, the first layer of the classifier
FAMILIES = [
    ("resnet18", 40, 512, "fc"),
    ("resnet50", 40, 2048, "fc"),
    ("efficientnet_b0", 40, 1280, "classifier.1"),
    ("mobilenet_v2", 40, 1280, "classifier.1"),
    ("mobilenet_v3_small", 40, 576, "classifier.0"),
    ("shufflenet_v2_x0_5", 40, 1024, "fc"),
    ("squeezenet1_1", 40, 512, "classifier.1"),
    ("convnext_tiny", 64, 768, "classifier.2"),
    ("densenet121", 40, 1024, "classifier"),
    ("vit_b_32", 64, 768, "heads.head"),
    ("swin_t", 64, 768, "head"),
    ("regnet_y_400mf", 40, 440, "fc"),
    ("googlenet", 64, 1024, "fc"),
    ("mnasnet0_5", 40, 1280, "classifier.1"),
]


def full_model(arch, size):
    options = {"image_size": size} if arch.startswith("vit_") else {}
    if arch == "googlenet":
        options = {"aux_logits": False, "init_weights": True}
    return torchvision.models.get_model(arch, weights=None, **options)


@pytest.mark.parametrize(("arch", "size", "width", "layer"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_features_are_what_enters_the_classifier(arch, size, width, layer):
    model = full_model(arch, size)
    for module in model.modules():  # running statistics that are not those of a fresh network
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.9, 1.1)
    model.eval()
    entered = []
    model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    images = torch.randn(2, 3, size, size)
    trunk = build_backbone(arch, image_size=size)
    state = model.state_dict()
    assert set(trunk.state_dict()) < set(state)  # torchvision's names, and nothing of our own
    left = set(state) - set(trunk.state_dict())
    assert left
    assert all(key.startswith(layer.split(".")[0] + ".") for key in left)
    trunk.eval()
    with torch.no_grad():
        for key, value in trunk.state_dict().items():
            value.copy_(state[key])
        model(images)
        features = trunk(images)
    expected = entered[0]
    if expected.ndim == 4:  # SqueezeNet classifies each place and averages afterwards
        expected = expected.mean(dim=(2, 3))
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(features, expected)
    assert features.shape == (2, width)
    assert trunk.spec.feature_dim == width
    assert trunk.spec.record() == {"arch": arch, "stem": "imagenet", "image_size": size,
                                   "feature": "cls" if arch.startswith("vit") else "pool"}
    assert features.abs().sum() > 0


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "googlenet"])
def test_no_dropout_is_left_before_the_features(arch):
    trunk = build_backbone(arch, image_size=64)
    assert not [name for name, module in trunk.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]


def test_record_builds_the_same_trunk_again():
    trunk = build_backbone("resnet18", "cifar", 32)
    again = build_backbone(**trunk.spec.record())
    assert again.spec == trunk.spec
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in trunk.state_dict().items()}


@pytest.mark.parametrize(("arch", "name", "imagenet_stride"), [
    ("resnet18", "conv1", 2), ("resnet50", "conv1", 2), ("efficientnet_b0", "features.0.0", 2),
    ("mobilenet_v3_small", "features.0.0", 2), ("shufflenet_v2_x0_5", "conv1.0", 2),
    ("squeezenet1_1", "features.0", 2), ("densenet121", "features.conv0", 2), ("regnet_y_400mf", "stem.0", 2),
])
def test_cifar_stem(arch, name, imagenet_stride):
    old, new = build_backbone(arch).get_submodule(name), build_backbone(arch, "cifar", 32).get_submodule(name)
    assert old.stride == (imagenet_stride, imagenet_stride)
    assert (new.kernel_size, new.stride, new.padding) == ((3, 3), (1, 1), (1, 1))
    assert (new.in_channels, new.out_channels) == (3, old.out_channels)
    assert (new.bias is None) == (old.bias is None)


@pytest.mark.parametrize(("arch", "before_stage_one"), [("resnet18", "layer1"), ("densenet121", "features.denseblock1"),
                                                        ("shufflenet_v2_x0_5", "stage2")])
def test_cifar_stem_keeps_the_resolution_up_to_the_first_stage(arch, before_stage_one):
    shapes = {}
    for stem in ("imagenet", "cifar"):
        trunk = build_backbone(arch, stem, 32).eval()
        trunk.get_submodule(before_stage_one).register_forward_pre_hook(
            lambda _, inputs, stem=stem: shapes.__setitem__(stem, inputs[0].shape[-2:]))
        with torch.no_grad():
            assert trunk(torch.randn(2, 3, 32, 32)).shape == (2, trunk.spec.feature_dim)
    assert shapes == {"imagenet": (8, 8), "cifar": (32, 32)}


@pytest.mark.parametrize("arch", ["vit_b_32", "swin_t", "convnext_tiny"])
def test_cifar_stem_is_refused_where_the_image_is_cut_into_patches(arch):
    with pytest.raises(UserError, match="--stem cifar needs a convolutional stem") as caught:
        build_backbone(arch, "cifar", 32)
    assert arch in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_stem():
    with pytest.raises(UserError, match="--stem mnist is unknown; choose from imagenet, cifar"):
        build_backbone("resnet18", "mnist")


@pytest.mark.parametrize(("typed", "meant"), [("resnet81", "resnet18"), ("ResNet50", "resnet50"),
                                              ("efficientnet-b0", "efficientnet_b0"), ("mobilnet_v2", "mobilenet_v2"),
                                              ("vit_b16", "vit_b_16")])
def test_unknown_arch_names_the_nearest(typed, meant):
    for refuse in (lambda: check_arch(typed, "--student_arch"),
                   lambda: build_backbone(typed, flag="--student_arch")):
        with pytest.raises(UserError) as caught:
            refuse()
        text = str(caught.value)
        assert text.startswith(f"--student_arch {typed} ")
        assert meant in text
        assert "\n" not in text


def test_the_names_in_torchvisions_source_are_those_that_it_lists():
    assert set(_names_in_source()) == set(arch_names()) - {
        *VITS, *ORIGINALS, "shufflenet_small", "squeezenet_small", "resnet_small"}  # helpers.small's


def test_only_classifiers_are_known():
    assert "resnet50" in arch_names()
    for other in ("fasterrcnn_resnet50_fpn", "deeplabv3_resnet50", "raft_small", "r3d_18"):
        assert other not in arch_names()
        with pytest.raises(UserError):
            check_arch(other, "--arch")


def test_a_transformers_image_size_that_does_not_fit_is_one_sentence():
    with pytest.raises(UserError, match="patches of 32 .* 33; give --image-size 32 or 64") as caught:
        build_backbone("vit_b_32", image_size=33)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arch", ["resnet18", "convnext_tiny", "vit_b_32", "squeezenet1_1", "mobilenet_v3_small"])
def test_attach_head_works_where_the_classifier_was(arch):
    trunk = build_backbone(arch, image_size=64)
    names, width = set(trunk.state_dict()), trunk.spec.feature_dim
    head = nn.Linear(width, 5)
    encoder = attach_head(trunk, head).eval()
    images = torch.randn(2, 3, 64, 64)
    plain = build_backbone(arch, image_size=64).eval()
    plain.load_state_dict({k: v for k, v in encoder.state_dict().items() if k in names})
    with torch.no_grad():
        assert torch.allclose(encoder(images), head(plain(images)), atol=1e-6)
    added = set(encoder.state_dict()) - names
    assert len(added) == 2
    assert all(key.startswith(trunk.spec.head_name + ".") for key in added)


def test_every_torchvision_builder_name_is_offered():
    """Each other listed name is a builder in torchvision.models, whatever its version."""
    ours = {*VITS, *ORIGINALS}
    assert ours <= set(arch_names())
    for name in set(arch_names()) - ours - {"shufflenet_small", "squeezenet_small", "resnet_small"}:  # helpers.small's
        assert inspect.isfunction(getattr(torchvision.models, name)), name
