"""Every layout fills the trunk exactly, or the file is refused in one line that names it."""

import hashlib
import io
import zipfile

import pytest
import torch
import torchvision
from torch import nn

from checkpoints.frozen import load_frozen
from checkpoints.identify import Identity
from checkpoints.reader import read_checkpoint
from checkpoints.safe_load import file_sha256
from models.backbones import build_backbone
from runtime.errors import UserError
from runtime.store import save_checkpoint

ARCH = "resnet_small"


@pytest.fixture(scope="module")
def model():
    """torchvision's own ResNet, and statistics that no fresh network has."""
    torch.manual_seed(3)
    model = torchvision.models.get_model(ARCH)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.8, 1.2)
            module.num_batches_tracked.fill_(17)
    return model.eval()


@pytest.fixture(scope="module")
def features(model):
    """What the source network computes, without our code: (images, its pooled features)."""
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    entered = []
    hook = model.fc.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    return images, entered[0]


def trunk_of(model):
    return {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}


def moco(model, prefix="module."):
    trunk = trunk_of(model)
    state = {f"{prefix}encoder_q.{k}": v for k, v in trunk.items()}
    state |= {f"{prefix}encoder_q.fc.{i}.{n}": torch.randn(3) for i in (0, 2) for n in ("weight", "bias")}
    state |= {f"{prefix}encoder_k.{k}": torch.zeros_like(v) for k, v in trunk.items()}  # must not be the ones taken
    state |= {f"{prefix}encoder_k.fc.0.weight": torch.randn(3), f"{prefix}queue": torch.randn(128, 64),
              f"{prefix}queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 200, "arch": ARCH, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


LAYOUTS = {  # those of the public projects are in test_layouts.py
    "MoCo's file without DDP's prefix": lambda m: moco(m, ""),
    "torchvision in 'model'": lambda m: {"model": m.state_dict(), "epoch": 3},
    "compiled around DDP": lambda m: {f"_orig_mod.module.{k}": v for k, v in trunk_of(m).items()},
    "CoSS student": lambda m: {"arch": ARCH, "stem": "imagenet", "image_size": 48, "state_dict": {
        **{f"backbone.{k}": v for k, v in trunk_of(m).items()},
        "proj_head.0.weight": torch.randn(8, 128), "proj_head.2.bias": torch.randn(8)}},
    "without the counters of batch norm": lambda m: {
        k: v for k, v in trunk_of(m).items() if not k.endswith("num_batches_tracked")},
    "CoSS student's fc left in": lambda m: {"state_dict": {f"backbone.{k}": v for k, v in m.state_dict().items()}},
}


def save(state, folder, name="file.pth"):
    torch.save(state, folder / name)
    return folder / name


def refusal(path, flag="--weights", arch=ARCH, stem="imagenet", key=None):
    """The one line that a refused file gives."""
    with pytest.raises(UserError) as caught:
        read_checkpoint(path, key, flag).load_into(build_backbone(arch, stem))
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    assert caught.value.exit_code == 2
    return text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_equals_the_source(tmp_path, model, features, layout):
    path = save(LAYOUTS[layout](model), tmp_path)
    trunk = build_backbone(ARCH)
    report = read_checkpoint(path).load_into(trunk)
    with torch.no_grad():
        assert torch.equal(trunk.eval()(features[0]), features[1])
    filled = len([k for k in trunk.state_dict() if "counters" not in layout or not k.endswith("num_batches_tracked")])
    assert report.matched == filled
    assert not report.missing
    assert not report.unexpected
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == file_sha256(path)


def test_report_says_what_was_dropped(tmp_path, model):
    report = read_checkpoint(save(moco(model), tmp_path)).load_into(build_backbone(ARCH))
    assert report.layout == "MoCo"
    assert report.epoch == 200
    assert report.dropped == {"encoder_q.fc.": 4, "encoder_k.": len(trunk_of(model)) + 1, "queue": 2}
    text = str(report)
    assert "\n" not in text
    assert report.sha256[:16] in text
    assert report.record()["matched"] == len(trunk_of(model))


def test_half_precision_tensors_are_widened(tmp_path, model, features):
    halves = {k: v.half() if v.is_floating_point() else v for k, v in trunk_of(model).items()}
    trunk = build_backbone(ARCH)
    read_checkpoint(save(halves, tmp_path)).load_into(trunk)
    for key, value in trunk.state_dict().items():
        assert torch.equal(value, halves[key].to(value.dtype))
        assert value.dtype == trunk_of(model)[key].dtype
    with torch.no_grad():
        assert torch.allclose(trunk.eval()(features[0]), features[1], atol=0.05)


@pytest.mark.parametrize("arch", ["efficientnet_b0", "mobilenet_v3_small", "mnasnet0_5", "convnext_tiny",
                                  "squeezenet1_1"])
def test_other_families_with_their_classifier(tmp_path, arch):
    source = torchvision.models.get_model(arch).state_dict()
    trunk = build_backbone(arch)
    report = read_checkpoint(save(source, tmp_path)).load_into(trunk)
    assert report.matched + sum(report.dropped.values()) == len(source)
    for key, value in trunk.state_dict().items():
        assert torch.equal(value, source[key])


def test_metadata(tmp_path, model):
    checkpoint = read_checkpoint(save(LAYOUTS["CoSS student"](model), tmp_path))
    assert checkpoint.meta == {"arch": ARCH, "stem": "imagenet", "image_size": 48}
    assert checkpoint.identify() == Identity(ARCH, "imagenet", 48)
    bare = read_checkpoint(save(trunk_of(model), tmp_path))
    assert bare.meta == {}
    assert bare.identify() == Identity(ARCH, "imagenet", 224)  # told from the shapes
    strange = read_checkpoint(save({"arch": "my_net", "epoch": "3", "state_dict": trunk_of(model)}, tmp_path))
    assert strange.meta == {"arch": "my_net"}
    assert strange.identify() == Identity(ARCH, "imagenet", 224)


# ---- the trunk does not fit


def test_a_deeper_network_fills_the_trunk_and_is_refused_for_what_is_left(tmp_path):
    deeper = torchvision.models.resnet34().state_dict()
    assert set(build_backbone("resnet18").state_dict()) < set(deeper)  # filling alone proves nothing
    text = refusal(save({"arch": "resnet34", "state_dict": deeper}, tmp_path), arch="resnet18")
    assert "unexpected" in text
    assert "layer1.2.conv1.weight" in text
    assert "the file says it holds resnet34" in text
    assert "missing" not in text


def test_a_shallower_network_is_refused_for_what_is_missing(tmp_path):
    text = refusal(save(moco(torchvision.models.resnet18()), tmp_path), arch="resnet34")
    assert "missing" in text
    assert "layer1.2.conv1.weight" in text
    assert "unexpected" not in text


@pytest.mark.parametrize("key", ["conv1.weight", "layer4.0.bn2.running_var", "layer3.0.downsample.1.bias"])
def test_one_missing_key(tmp_path, model, key):
    state = moco(model)
    del state["state_dict"][f"module.encoder_q.{key}"]
    text = refusal(save(state, tmp_path))
    assert f"1 missing ({key})" in text


@pytest.mark.parametrize("key", ["module.encoder_q.layer5.0.weight", "module.something.weight", "module.fc.weight"])
def test_one_key_too_many(tmp_path, model, key):
    state = moco(model)
    state["state_dict"][key] = torch.zeros(2)
    text = refusal(save(state, tmp_path))
    assert f"1 unexpected ({key.removeprefix('module.')})" in text


@pytest.mark.parametrize("where", ["has.encoder_q.inside", "sub.backbone.conv1.weight"])
def test_prefixes_count_only_at_the_start(tmp_path, model, where):
    state = {**trunk_of(model), where: torch.zeros(1)}
    assert f"1 unexpected ({where})" in refusal(save(state, tmp_path))


def test_the_other_stem(tmp_path):
    cifar = build_backbone(ARCH, "cifar", 32)
    text = refusal(save({**cifar.spec.record(), "state_dict": {
        f"module.encoder_q.{k}": v for k, v in cifar.state_dict().items()}}, tmp_path))
    assert "of another shape" in text
    assert "conv1.weight [16, 3, 3, 3] for [16, 3, 7, 7]" in text
    assert "stem" in text


def test_another_family(tmp_path, model):
    text = refusal(save(moco(model), tmp_path), arch="mobilenet_v3_small")
    assert "missing" in text
    assert "unexpected" in text
    assert ARCH in text


def test_the_trunk_stays_as_it_was_when_refused(tmp_path):
    trunk = build_backbone(ARCH)
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    path = save(torchvision.models.resnet34().state_dict(), tmp_path)
    with pytest.raises(UserError):
        read_checkpoint(path).load_into(trunk)
    for key, value in trunk.state_dict().items():
        assert torch.equal(value, before[key])


# ---- no checkpoint at all


def archive(entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for name, content in entries.items():
            zipped.writestr(name, content)
    return file.getvalue()


NOT_CHECKPOINTS = {
    "html": (b"<!DOCTYPE html>\n<html><body>404</body></html>\n", "web page"),
    "html after blanks": (b"\n  <html></html>", "web page"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n", "Git LFS pointer"),
    "empty": (b"", "empty"),
    "text": (b"hello world, this is no checkpoint\n", "not a PyTorch checkpoint"),
    "zeros": (bytes(4096), "not a PyTorch checkpoint"),
    "a zip": (archive({"readme.txt": "hello"}), "not a PyTorch checkpoint"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(200), "not a PyTorch checkpoint"),
}


@pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
def test_not_a_checkpoint(tmp_path, kind):
    content, says = NOT_CHECKPOINTS[kind]
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    text = refusal(path, flag="--distill")
    assert text.startswith(f"--distill {path} ")
    assert says in text


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("legacy", [False, True])
def test_truncated(tmp_path, model, share, legacy):
    path = tmp_path / "file.pth"
    torch.save(moco(model), path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])
    assert "cut short" in (text := refusal(path)) or "damaged" in text


def test_missing_file_and_folder(tmp_path):
    assert "is not a file" in refusal(tmp_path / "nowhere.pth")
    assert "is a folder without model.safetensors or pytorch_model.bin" in refusal(tmp_path)


@pytest.mark.parametrize(("state", "says"), [
    ({}, "no tensors"),
    ({"epoch": 3, "arch": "resnet18"}, "epoch"),
    ({"state_dict": {}}, "no tensors"),
    ({"state_dict": {"a": 1, "b": "text"}}, "no tensors"),
    ([torch.zeros(3)], "list"),
    (torch.zeros(3), "Tensor"),
    ({"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, "no image backbone"),
    ({"state_dict": {"module.queue": torch.zeros(3, 4)}}, "no image backbone"),
])
def test_nothing_to_load(tmp_path, state, says):
    assert says in refusal(save(state, tmp_path))


# ---- --checkpoint-key


def test_checkpoint_key_names_the_container(tmp_path, model, features):
    other = {k: torch.zeros_like(v) for k, v in trunk_of(model).items()}
    path = save({"state_dict": other, "ema": trunk_of(model)}, tmp_path)
    trunk = build_backbone(ARCH)
    read_checkpoint(path, "ema").load_into(trunk)
    with torch.no_grad():
        assert torch.equal(trunk.eval()(features[0]), features[1])


def test_wrong_checkpoint_key(tmp_path, model):
    path = save(moco(model), tmp_path)
    text = refusal(path, key="teacher")
    assert text.startswith("--checkpoint-key teacher ")
    assert "state_dict" in text


def test_checkpoint_key_of_a_bare_file_is_passed_over_as_in_the_original(tmp_path, model):
    report = read_checkpoint(save(trunk_of(model), tmp_path), "teacher").load_into(build_backbone(ARCH))
    assert report.matched == len(trunk_of(model))


def test_load_frozen_says_the_flag(tmp_path):
    path = save(torchvision.models.resnet34().state_dict(), tmp_path)
    with pytest.raises(UserError) as caught:
        load_frozen(path, ARCH, flag="--distill", prefix="--teacher-")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("place", ["a weight", "the epoch", "the checksum"])
@pytest.mark.parametrize("trust", [False, True])
def test_a_file_of_ours_that_is_not_as_it_was_written_is_refused(tmp_path, place, trust):
    """Repacked so that the archive itself is whole: what was written knows better."""
    backbone = build_backbone("squeezenet1_1", image_size=32)
    content = {"epoch": 3, "steps": 9, **backbone.spec.record(),
               "state_dict": {f"backbone.{k}": v for k, v in backbone.state_dict().items()}}
    path = save_checkpoint(content, tmp_path / "student.pth")
    read_checkpoint(path, trust=trust)
    changed = torch.load(path, weights_only=True)
    if place == "a weight":
        next(iter(changed["state_dict"].values()))[3, 1, 0, 2] += 1e-6
    elif place == "the epoch":
        changed["epoch"] = 4
    else:
        changed["checksum"] = "0" * 64
    torch.save(changed, path)
    said = f"--weights {path} is damaged.*its content does not have the checksum"
    with pytest.raises(UserError, match=said):
        read_checkpoint(path, trust=trust)
    del changed["checksum"]
    torch.save(changed, path)
    assert read_checkpoint(path, trust=trust).tensors
