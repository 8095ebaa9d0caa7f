"""What a transformer's feature is, and its size, against timm's own networks and their own tokens."""

import copy

import pytest
import torch
from helpers.sources import randomise

from checkpoints.frozen import load_frozen
from models.anysize import AnySize
from models.backbones import build_backbone
from models.tokens import own_feature
from runtime.errors import UserError

timm = pytest.importorskip("timm", reason="timm's own networks are the oracle; pip install timm")
TINY = {"embed_dim": 48, "depth": 2, "num_heads": 2}
VIT = timm.models.VisionTransformer
DINOV2 = {"img_size": 518, "patch_size": 14, "init_values": 1e-5}
NETWORKS = {  # the families' marks, small
    "tiny_patch14_dinov2": (VIT, DINOV2),
    "tiny_reg4_dinov2": (VIT, {**DINOV2, "reg_tokens": 4, "no_embed_class": True}),
    "tiny_dinov3": (timm.models.Eva, {  # rotary positions, and timm's network averages the patches
        "img_size": 256, "patch_size": 16, "use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3",
        "dynamic_img_size": True, "num_reg_tokens": 4, "init_values": 1e-5, "use_fc_norm": False}),
    "tiny_siglip": (VIT, {"patch_size": 16, "class_token": False, "global_pool": "map"}),
    "tiny_gap": (VIT, {"patch_size": 16, "global_pool": "avg"}),  # its last norm comes behind the mean
}


@pytest.fixture(scope="module", autouse=True)
def _networks():
    """timm knows them by name."""
    def maker(kind, own):
        def make(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options):
            model = kind(**{**own, **TINY, **options})
            model.pretrained_cfg = {}
            return model
        return make

    known = timm.models._registry._model_entrypoints
    known.update((name, maker(*found)) for name, found in NETWORKS.items())
    yield
    for name in NETWORKS:
        del known[name]


def saved(name, folder, **options):
    """A file in timm's names, and the network that it is of."""
    model = randomise(timm.create_model(name, num_classes=0, **options), 1)
    torch.save(model.state_dict(), folder / "file.pth")
    return folder / "file.pth", model


@pytest.mark.parametrize(("name", "size", "said"), [
    ("tiny_patch14_dinov2", 70, "resampled from 37x37 to 5x5"), ("tiny_reg4_dinov2", 112, "from 37x37 to 8x8"),
    ("tiny_patch14_dinov2", 518, ""), ("tiny_dinov3", 96, ""), ("tiny_siglip", 64, "resampled from 14x14 to 4x4")])
def test_any_size_is_timms_own_network_at_that_size(name, size, said, tmp_path):
    path, _ = saved(name, tmp_path)
    encoder, report = load_frozen(path, f"timm:{name}", image_size=size, feature="pool")
    theirs = timm.create_model(name, num_classes=0, img_size=size)
    theirs.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(
        torch.load(path, weights_only=True), theirs) if said else torch.load(path, weights_only=True))
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(encoder.backbone(images), theirs.eval()(images), rtol=1e-5, atol=1e-5)
    assert (report.image_size, " ".join(report.notes).endswith(said)) == (size, True)
    assert bool(report.notes) == bool(said)


def test_torchvisions_positions_too(tmp_path):
    model = randomise(timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0), 1)
    torch.save(model.state_dict(), tmp_path / "file.pth")
    encoder, report = load_frozen(tmp_path / "file.pth", image_size=96)
    assert (report.arch, report.notes) == ("vit_ti_16", ["positions resampled from 4x4 to 6x6"])
    model.set_input_size(96)
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(encoder.backbone(images), model(images), rtol=1e-5, atol=1e-5)
    assert load_frozen(tmp_path / "file.pth")[1].image_size == 64    # its own, where none is asked for


def test_without_a_size_dinov2_sees_what_its_authors_evaluate_at(tmp_path):
    path, _ = saved("tiny_patch14_dinov2", tmp_path)
    assert load_frozen(path, "timm:tiny_patch14_dinov2")[1].image_size == 224


@pytest.mark.parametrize(("arch", "size", "advice"), [
    ("timm:tiny_patch14_dinov2", 100, "--image-size 98 or 112"), ("vit_ti_16", 8, "--image-size 16"),
    ("vit_b_32", 100, "--image-size 96 or 128")])
def test_a_size_between_patches_is_refused_with_the_nearest_that_fit(arch, size, advice):
    with pytest.raises(UserError, match=f"do not divide images of {size}; give {advice}$"):
        build_backbone(arch, image_size=size)
    with pytest.raises(UserError, match="give --teacher-image-size"):
        build_backbone(arch, image_size=size, flag="--teacher-arch")


def tokens_of(model, images):
    """Class token and patches after the last norm, by timm's own forward_intermediates."""
    (patches, prefix), = model.forward_intermediates(images, 1, return_prefix_tokens=True, norm=True, output_fmt="NLC",
                                                     intermediates_only=True)
    return prefix[:, 0], patches.mean(dim=1)


@pytest.mark.parametrize("name", ["tiny_patch14_dinov2", "tiny_reg4_dinov2", "tiny_dinov3"])
def test_the_feature_is_the_class_token_the_mean_or_both(name, tmp_path):
    path, _ = saved(name, tmp_path, img_size=112)
    images, arch, found = torch.randn(2, 3, 112, 112), f"timm:{name}", {}
    for feature in ("cls", "mean", "cls+mean", "auto"):
        encoder, report = load_frozen(path, arch, image_size=112, feature=feature)
        found[feature] = encoder.backbone(images)
        assert found[feature].shape == (2, encoder.backbone.spec.feature_dim)
        assert report.feature == encoder.backbone.spec.feature == ("cls" if feature == "auto" else feature)
        assert copy.deepcopy(encoder).backbone(images).equal(found[feature])
        torch.testing.assert_close(AnySize(encoder.backbone)(images), found[feature])
    cls, mean = tokens_of(encoder.backbone, images)
    torch.testing.assert_close(found["cls"], cls)
    torch.testing.assert_close(found["auto"], cls)
    torch.testing.assert_close(found["mean"], mean)
    torch.testing.assert_close(found["cls+mean"], torch.cat([cls, mean], dim=1))


def test_torchvisions_tokens():
    torch.manual_seed(0)
    networks = {feature: build_backbone("vit_ti_16", image_size=32, feature=feature).eval()
                for feature in ("cls", "mean", "cls+mean")}
    for network in networks.values():
        network.load_state_dict(networks["cls"].state_dict())
    images, seen = torch.randn(2, 3, 32, 32), []
    networks["cls"].encoder.register_forward_hook(lambda *found: seen.append(found[-1]))
    cls = networks["cls"](images)
    torch.testing.assert_close(cls, seen[0][:, 0])
    torch.testing.assert_close(networks["mean"](images), seen[0][:, 1:].mean(dim=1))
    torch.testing.assert_close(networks["cls+mean"](images), torch.cat([cls, seen[0][:, 1:].mean(dim=1)], dim=1))
    assert networks["cls+mean"].spec.feature_dim == 384


def test_auto_is_what_each_networks_own_evaluation_takes():
    def auto(arch):
        return build_backbone(arch, image_size=112).spec.feature
    assert [auto(f"timm:{name}") for name in ("tiny_patch14_dinov2", "tiny_dinov3", "tiny_siglip", "tiny_gap")] == [
        "cls", "cls", "pool", "mean"]
    assert (auto("vit_ti_16"), auto("resnet18")) == ("cls", "pool")
    gap = build_backbone("timm:tiny_gap", image_size=112, feature="cls").eval()
    images = torch.randn(1, 3, 112, 112)
    torch.testing.assert_close(gap(images), gap.fc_norm(gap.forward_features(images)[:, 0]))
    assert own_feature(gap) == "mean"


def test_tokens_that_there_are_not():
    with pytest.raises(UserError, match="^--feature cls: timm:tiny_siglip has no class token; give mean or pool"):
        build_backbone("timm:tiny_siglip", image_size=112, feature="cls")
    with pytest.raises(UserError, match="^--teacher-feature mean: resnet18 has no tokens"):
        build_backbone("resnet18", feature="mean", flag="--teacher-arch")


def test_a_student_reads_back_with_its_size_and_its_feature(tmp_path):
    trunk = build_backbone("timm:tiny_patch14_dinov2", image_size=70, feature="mean")
    state = {f"backbone.{name}": value for name, value in trunk.state_dict().items()}
    torch.save({**trunk.spec.record(), "state_dict": state}, tmp_path / "student.pth")
    encoder, _ = load_frozen(tmp_path / "student.pth")
    assert encoder.backbone.spec == trunk.spec
    images = torch.randn(1, 3, 70, 70)
    torch.testing.assert_close(encoder.backbone(images), trunk.eval()(images))
    assert load_frozen(tmp_path / "student.pth", image_size=112, feature="cls")[0].backbone.spec.feature == "cls"
