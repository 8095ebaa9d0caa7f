"""Each format read by the program that it is for, or by a few lines written here, not by our code."""

import contextlib
import copy
import dataclasses
import io
import json
import os
import pickle
import resource
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers.scripts import script
from PIL import Image
from torch import nn

from checkpoints.conversion import TARGETS, check_output, check_target, export
from checkpoints.frozen import load_frozen
from checkpoints.report import Report
from checkpoints.targets import Network, Target
from checkpoints.targets_timm import IN_ORDER, SWINS
from models.backbones import Spec, build_backbone
from models.tokens import use_feature
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
SIZE = 64
HEADS = {"resnet18": "fc", "resnet_small": "fc", "resnet_small cifar": "fc", "mobilenet_v3_small": "classifier",
         "efficientnet_b0": "classifier", "vit_ti_16": "heads"}
WIDTHS = {"resnet18": 512, "resnet_small": 128, "resnet_small cifar": 128, "mobilenet_v3_small": 576,
          "efficientnet_b0": 1280, "vit_ti_16": 192}


def build(kind):
    """The network as torchvision's user builds it, its classifier off."""
    arch, _, stem = kind.partition(" ")
    if arch == "vit_ti_16":
        model = torchvision.models.VisionTransformer(SIZE, 16, 12, 3, 192, 768)
    else:
        model = torchvision.models.get_model(arch)
    if stem:
        model.conv1, model.maxpool = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Identity()
    setattr(model, HEADS[kind], nn.Identity())
    return model.eval().requires_grad_(False)  # attention takes another kernel where weights could train


def saved(kind, folder, head_of=3):
    """A student's file in our layout around a network with statistics unlike a fresh one's, and that network."""
    torch.manual_seed(1)
    model = build(kind)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for name, value in model.named_parameters():
        if kind == "vit_ti_16" and name.endswith("bias"):
            nn.init.normal_(value, std=0.1)
    head = nn.Sequential(nn.Linear(WIDTHS[kind], 16), nn.ReLU(), nn.Linear(16, head_of))
    state = {**{f"backbone.{k}": v for k, v in model.state_dict().items()},
             **{f"proj_head.{k}": v for k, v in head.state_dict().items()}}
    arch, _, stem = kind.partition(" ")
    path = folder / f"{kind.replace(' ', '_')}.pth"
    torch.save({"arch": arch, "stem": stem or "imagenet", "image_size": SIZE, "mean": [0.5, 0.4, 0.3],
                "std": [0.2, 0.21, 0.22], "epoch": 7, "state_dict": state}, path)
    return path, model, head


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """kind -> (path of its file, the network in it, its head, what our reader makes of it), each made once."""
    folder, made = tmp_path_factory.mktemp("sources"), {}

    def source(kind):
        if kind not in made:
            path, model, head = saved(kind, folder)
            made[kind] = path, model, head, Network.of(*load_frozen(path, with_head=True))
        return made[kind]
    return source


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def without_head(network):
    return Network(network.trunk, None, network.report)


def need(to):
    for package in TARGETS[to].packages:
        pytest.importorskip(package, reason=f"--to {to} needs {package}")


@torch.no_grad()
def largest(a, b):
    return float((a - b).abs().max() / b.abs().max())


# ---- each target, loaded in its own way

@pytest.mark.parametrize("kind", [kind for kind in WIDTHS if kind != "resnet18"])
def test_torchvision(tmp_path, sources, images, kind):
    _, model, _, network = sources(kind)
    done = export(without_head(network), "torchvision", tmp_path / "o.pth", {"random": images})
    loaded = build(kind)
    loaded.load_state_dict(torch.load(tmp_path / "o.pth", weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert (done.difference, done.images, done.projector) == (0, {"random": 3}, None)
    assert [path.name for path in tmp_path.iterdir()] == ["o.pth"]


@pytest.mark.parametrize("kind", ["resnet_small cifar", "vit_ti_16", "mobilenet_v3_small"])
def test_safetensors(tmp_path, sources, images, kind):
    need("safetensors")
    from safetensors import safe_open
    from safetensors.torch import load_file

    path, model, _, network = sources(kind)
    out = tmp_path / "o.safetensors"
    export(without_head(network), "safetensors", out, {"random": images})
    loaded = build(kind)
    loaded.load_state_dict(load_file(out), strict=True)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    with safe_open(out, framework="pt") as file:
        about = file.metadata()
    arch, _, stem = kind.partition(" ")
    assert (about["arch"], about["stem"], about["image_size"]) == (arch, stem or "imagenet", str(SIZE))
    assert (json.loads(about["mean"]), json.loads(about["std"])) == ([0.5, 0.4, 0.3], [0.2, 0.21, 0.22])
    assert about["source_sha256"] == network.report.sha256
    encoder, report = load_frozen(out)
    assert (encoder.backbone.spec, report.mean) == (network.trunk.spec, [0.5, 0.4, 0.3])
    assert out.stat().st_mode & 0o777 == path.stat().st_mode & 0o777


@pytest.mark.parametrize(("kind", "name"), [
    ("resnet18", "resnet18"), ("vit_ti_16", "vit_tiny_patch16_224"), ("efficientnet_b0", "efficientnet_b0")])
def test_timm(tmp_path, sources, images, kind, name):
    need("timm")
    import timm

    _, model, _, network = sources(kind)
    done = export(without_head(network), "timm", tmp_path / "o.pth", {"random": images})
    options = {"img_size": SIZE} if kind == "vit_ti_16" else {}
    loaded = timm.create_model(name, num_classes=0, **options).eval()
    loaded.load_state_dict(torch.load(tmp_path / "o.pth", weights_only=True), strict=True)
    with torch.no_grad():
        assert largest(loaded(images), model(images)) <= 1e-5
    assert repr(name) in done.code


SMALL_SWIN = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}


def small_swin(window=7, **parts):
    return torchvision.models.SwinTransformer([4, 4], 16, [1, 1, 2, 1], [1, 1, 2, 2], [window] * 2, num_classes=3,
                                              **parts)


def small_swin_v2():
    swin = torchvision.models.swin_transformer
    return small_swin(8, block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2)


@pytest.mark.parametrize(("arch", "build", "size", "smaller"), [
    ("regnet_y_400mf", torchvision.models.regnet_y_400mf, SIZE, {}),
    ("vgg11", torchvision.models.vgg11, SIZE, {"mlp_ratio": 1e-3}),  # of layers that the trunk has not
    ("swin_t", small_swin, 224, SMALL_SWIN), ("swin_v2_s", small_swin_v2, 256, SMALL_SWIN)])
def test_timms_networks_that_declare_or_end_otherwise(tmp_path, monkeypatch, arch, build, size, smaller):
    """RegNet's shortcuts are declared last, VGG has two layers behind the pooling, Swin V2 no bias of the keys."""
    need("timm")
    table = SWINS if arch in SWINS else IN_ORDER
    monkeypatch.setitem(table, arch, (table[arch][0], smaller))
    torch.manual_seed(0)
    with torch.device("meta") if arch == "vgg11" else contextlib.nullcontext():
        model = build()  # whose classifier is large
    model = model.to_empty(device="cpu") if arch == "vgg11" else model
    head = {"regnet_y_400mf": "fc", "vgg11": "classifier"}.get(arch, "head")
    setattr(model, head, nn.Identity())
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not key.endswith(".relative_coords_table"):
            nn.init.uniform_(value, 0.5, 1) if "running" in key else nn.init.normal_(value, std=0.1)
    model.eval().requires_grad_(False).spec = Spec(arch, "imagenet", size, 0, head, "pool")
    images = torch.randn(2, 3, size, size)
    done, names = export(Network(model, None, Report("file")), "timm", tmp_path / "o.pth", {"random": images}), {}
    exec(done.code, names)
    assert type(names["model"]).__module__.startswith("timm.")
    assert largest(names["model"](images), model(images)) <= 1e-5


@pytest.mark.parametrize(("arch", "size", "least"), [("swin_t", 256, 224), ("swin_v2_t", 224, 256)])
def test_sizes_at_which_timms_swin_pads_otherwise(tmp_path, arch, size, least):
    need("timm")
    model = small_swin()
    model.spec = Spec(arch, "imagenet", size, 128, "head", "pool")
    with pytest.raises(UserError, match=f"cannot take {arch}: its images are {size} px wide, which timm's Swin pads in "
                                        f"another way unless the width is a multiple of {least};"):
        export(Network(model, None, Report("file")), "timm", tmp_path / "o.pth", {})


def test_timms_mobilenet_v3_without_its_layer_behind_the_pooling(tmp_path, sources, images):
    need("timm")
    _, model, _, network = sources("mobilenet_v3_small")
    done, names = export(without_head(network), "timm", tmp_path / "o.pth", {"random": images}), {}
    exec(done.code, names)
    assert "timm.create_model('mobilenetv3_small_100', num_classes=0, bn_eps=0.001)" in done.code
    assert type(names["model"]).__module__.startswith("timm.")
    with torch.no_grad():
        assert largest(names["model"](images), model(images)) <= 1e-5


def test_a_network_of_timms_own(tmp_path, images):
    need("timm")
    need("safetensors")
    import timm

    model = timm.create_model("mobilenetv3_small_050", num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path / "t.pth")
    network = Network.of(*load_frozen(tmp_path / "t.pth", "timm:mobilenetv3_small_050", image_size=SIZE))
    for to, name in (("timm", "o.pth"), ("safetensors", "o.safetensors")):
        assert export(network, to, tmp_path / name, {"random": images}).difference == 0
    for to in ("torchvision", "moco", "detectron2"):
        with pytest.raises(UserError, match=f"--to {to} cannot take timm:mobilenetv3_small_050"):
            export(network, to, tmp_path / "no.pth", {"random": images})


@pytest.mark.parametrize("kind", ["resnet_small", "vit_ti_16"])
def test_onnx(tmp_path, capfd, sources, images, kind):
    need("onnx")
    import onnxruntime

    _, model, head, network = sources(kind)
    with_head = kind == "vit_ti_16"
    if with_head:  # two of its twelve layers, which are alike and take long to trace
        model, network = copy.deepcopy((model, network))
        for trunk in (model, network.trunk):
            trunk.encoder.layers = trunk.encoder.layers[:2]
        use_feature(network.trunk, "mean")
        network.trunk.spec = dataclasses.replace(network.trunk.spec, feature="mean")
    tokens = []
    if with_head:
        model.encoder.register_forward_hook(lambda *given: tokens.append(given[-1]))
    done = export(network if with_head else without_head(network), "onnx", tmp_path / "o.onnx", {"random": images})
    assert [path.name for path in tmp_path.iterdir()] == ["o.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "o.onnx"), providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    assert (source.name, source.shape[1:], source.type) == ("images", [3, SIZE, SIZE], "tensor(float)")
    assert [x.name for x in session.get_outputs()] == ["features", "projected"][:1 + with_head]
    for count in (1, 3):
        outputs = session.run(None, {"images": images[:count].numpy()})
        with torch.no_grad():
            features = model(images[:count])
            features = tokens[-1][:, 1:].mean(1) if with_head else features
            wanted = [features, head(features)][:1 + with_head]
        for found, expected in zip(outputs, wanted, strict=True):
            assert largest(torch.from_numpy(found), expected) <= 1e-4
    about = session.get_modelmeta().custom_metadata_map
    assert (about["arch"], json.loads(about["std"])) == (kind, [0.2, 0.21, 0.22])
    assert about["feature"] == ("mean" if with_head else "pool")
    assert done.projector == (str(tmp_path / "o.onnx") if with_head else None)
    assert capfd.readouterr() == ("", "")


def detectron2_forward(weights, x):
    """A ResNet from detectron2's names: modeling/backbone/resnet.py, stride in the 3x3, written out."""
    def conv(name, x, stride, padding):
        x = F.conv2d(x, weights[f"{name}.weight"], stride=stride, padding=padding)
        norm = [weights[f"{name}.norm.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *norm)

    x = F.max_pool2d(F.relu(conv("stem.conv1", x, 2, 3)), 3, 2, 1)
    for stage in (2, 3, 4, 5):
        for block in range(sum(name.startswith(f"res{stage}.") and name.endswith(".conv1.weight") for name in weights)):
            at, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
            out = conv(f"{at}.conv2", F.relu(conv(f"{at}.conv1", x, stride, 1)), 1, 1)
            x = F.relu(out + (conv(f"{at}.shortcut", x, stride, 0) if f"{at}.shortcut.weight" in weights else x))
    return x.mean((2, 3))


def test_detectron2(tmp_path, sources, images):
    _, model, _, network = sources("resnet18")
    done = export(without_head(network), "detectron2", tmp_path / "o.pkl", {"random": images})
    with (tmp_path / "o.pkl").open("rb") as file:
        raw = pickle.load(file, encoding="latin1")
    assert raw["matching_heuristics"] is True
    assert isinstance(raw["__author__"], str)
    weights = {name: torch.from_numpy(array) for name, array in raw["model"].items()}
    assert not any("num_batches" in name for name in weights)
    with torch.no_grad():
        assert largest(detectron2_forward(weights, images), model(images)) < 1e-6
    for setting in ("'MODEL.RESNETS.DEPTH', 18", "'MODEL.PIXEL_MEAN', [127.5, 102.0, 76.5]", "STRIDE_IN_1X1', False"):
        assert setting in done.code


@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("kind", ["resnet_small", "resnet_small cifar"])
def test_moco_linear_evaluation(tmp_path, sources, images, kind, with_head):
    _, model, head, network = sources(kind)
    export(network if with_head else without_head(network), "moco", tmp_path / "o.pth", {"random": images})
    checkpoint = torch.load(tmp_path / "o.pth", weights_only=True)
    # What such scripts do: the query encoder without fc, renamed, into a network with a new classifier.
    kept = {name[len("module.encoder_q."):]: value for name, value in checkpoint["state_dict"].items()
            if name.startswith("module.encoder_q") and not name.startswith("module.encoder_q.fc")}
    loaded = build(kind)
    loaded.fc = nn.Linear(128, 10)
    message = loaded.load_state_dict(kept, strict=False)
    assert (set(message.missing_keys), message.unexpected_keys) == ({"fc.weight", "fc.bias"}, [])
    loaded.fc = nn.Identity()
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert checkpoint["arch"] == "resnet_small"
    encoder, report = load_frozen(tmp_path / "o.pth", with_head=with_head)
    assert (encoder.backbone.spec, report.epoch, report.std) == (network.trunk.spec, 7, [0.2, 0.21, 0.22])
    if with_head:
        with torch.no_grad():
            assert torch.equal(encoder.head(model(images)), head(model(images)))


@pytest.mark.parametrize(("to", "suffix"), [("torchvision", ".pth"), ("safetensors", ".safetensors")])
def test_projector_in_a_file_of_its_own(tmp_path, sources, images, to, suffix):
    need(to)
    _, model, head, network = sources("mobilenet_v3_small")
    done = export(network, to, tmp_path / f"o{suffix}", {"random": images})
    beside = tmp_path / f"o.projector{suffix}"
    assert {path.name for path in tmp_path.iterdir()} == {f"o{suffix}", beside.name}
    if to == "torchvision":
        state = torch.load(beside, weights_only=True)
    else:
        from safetensors.torch import load_file
        state = load_file(beside)
    loaded = nn.Sequential(nn.Linear(576, 16), nn.ReLU(), nn.Linear(16, 3))
    loaded.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(loaded(model(images)), head(model(images)))
    assert (done.projector, done.difference) == (str(beside), 0)


@pytest.mark.parametrize("to", ["torchvision", "moco", "safetensors", "timm"])
def test_the_printed_lines_run(tmp_path, sources, images, to):
    need(to)
    _, model, head, network = sources("resnet18" if to == "timm" else "resnet_small")
    network = without_head(network) if to == "timm" else network
    done = export(network, to, tmp_path / f"o{TARGETS[to].suffix}", {"random": images})
    scope = {}
    exec(done.code, scope)
    if done.projector_code:
        exec(done.projector_code, scope)
    with torch.no_grad():
        assert largest(scope["model"](images), model(images)) <= done.tolerance
        if to != "timm":
            assert torch.equal(scope["projector"](scope["model"](images)), head(model(images)))


# ---- what is wrong is not written

@pytest.mark.parametrize("to", ["torchvision", "timm", "safetensors", "detectron2", "moco"])
def test_an_export_that_reads_back_otherwise_leaves_nothing(tmp_path, monkeypatch, sources, images, to):
    need(to)
    _, _, _, network = sources("resnet18" if to in ("timm", "detectron2") else "resnet_small")
    honest, weight = type(TARGETS[to]).write, network.trunk.layer1[0].conv1.weight.data

    def corrupt(self, network, path):
        before = weight.clone()
        weight[0, 0, 0, 0] += 0.5
        honest(self, network, path)
        weight.copy_(before)

    monkeypatch.setattr(type(TARGETS[to]), "write", corrupt)
    out = tmp_path / f"o{TARGETS[to].suffix}"
    out.write_text("what was there before")
    with pytest.raises(UserError, match="was not written.*differ") as error:
        export(without_head(network), to, out, {"random": images})
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.read_text() == "what was there before"


def test_a_projector_that_reads_back_otherwise(tmp_path, monkeypatch, sources, images):
    _, _, _, network = sources("resnet_small")
    monkeypatch.setattr(Target, "write_projector", lambda self, network, path: torch.save(
        {name: value + 0.5 for name, value in network.head.state_dict().items()}, path))
    with pytest.raises(UserError, match="was not written.*differ"):
        export(network, "torchvision", tmp_path / "o.pth", {"random": images})
    assert not list(tmp_path.iterdir())


def test_features_that_are_not_finite(tmp_path, sources, images):
    _, _, _, network = sources("resnet_small")
    with pytest.raises(UserError, match="the source's features are not finite"):
        export(without_head(network), "torchvision", tmp_path / "o.pth", {"random": images, "bad": images / 0})
    assert not list(tmp_path.iterdir())


def test_a_file_that_its_library_refuses(tmp_path, monkeypatch, sources, images):
    _, _, _, network = sources("resnet_small")
    monkeypatch.setattr(Target, "write", lambda self, network, path: torch.save({"conv1.weight": torch.ones(1)}, path))
    with pytest.raises(UserError, match=r"was not written: resnet_small .*RuntimeError: Error"):
        export(without_head(network), "torchvision", tmp_path / "o.pth", {"random": images})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["torchvision", "safetensors", "detectron2", "onnx"])
def test_a_full_disk_is_called_so_and_not_a_failed_check(tmp_path, sources, images, to):
    need(to)
    network = without_head(sources("resnet18" if to == "detectron2" else "resnet_small")[3])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))  # no file can become larger
    try:
        with pytest.raises(UserError, match=r"could not be written \(File too large\); free some space"):
            export(network, to, tmp_path / f"o{TARGETS[to].suffix}", {"random": images})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_through_a_link_that_was_put_there(tmp_path, sources, images):
    network, other = without_head(sources("resnet_small")[3]), tmp_path / "other"
    other.write_text("of someone else")
    (tmp_path / f".o.{os.getpid()}.tmp.pth").symlink_to(other)
    (tmp_path / "o.pth").symlink_to(other)
    export(network, "torchvision", tmp_path / "o.pth", {"random": images})
    assert other.read_text() == "of someone else"
    assert not (tmp_path / "o.pth").is_symlink()


@pytest.mark.parametrize(("kind", "to", "says"), [
    ("resnet_small cifar", "timm", "its stem is cifar"), ("resnet_small cifar", "detectron2", "its stem is cifar"),
    ("mobilenet_v3_small", "detectron2", "backbones are ResNets"),
    ("resnet_small", "timm", "timm has no network resnet_small"),
])
def test_networks_that_a_format_cannot_take(tmp_path, sources, images, kind, to, says):
    need(to)
    with pytest.raises(UserError, match=f"--to {to} cannot take {kind.split()[0]}: .*{says}.*; choose --to"):
        export(without_head(sources(kind)[3]), to, tmp_path / "o.x", {"random": images})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["timm", "safetensors", "onnx"])
def test_a_missing_package_is_named(monkeypatch, to):
    monkeypatch.setitem(sys.modules, TARGETS[to].packages[-1], None)
    with pytest.raises(UserError, match=rf"--to {to} needs the package \w+, which is not installed; run `pip install"):
        check_target(to)


@pytest.mark.parametrize("to", ["timm", "detectron2"])
def test_no_place_for_a_projector(to):
    with pytest.raises(UserError, match=f"--with-projector: {to} cannot store"):
        check_target(to, with_projector=True)


def test_places_that_the_result_cannot_have(tmp_path, monkeypatch):
    there, beside = tmp_path / "there.pth", tmp_path / "new.projector.pth"
    there.touch()
    beside.touch()
    (tmp_path / "folder.pth").mkdir()

    def refused(path, says, to="torchvision", force=False, **more):
        with pytest.raises(UserError, match=says):
            check_output(to, path, force, **more)

    refused(there, "exists; choose another name, or add --force")
    refused(tmp_path / "new.pth", r"new\.projector\.pth exists", with_projector=True)
    refused(there, "is a file that is read here", force=True, source=there)
    refused(tmp_path / "none" / "o.pth", "none does not exist")
    refused(tmp_path / "folder.pth", "is a folder", force=True)
    os.mkfifo(tmp_path / "pipe.pth")
    refused(tmp_path / "pipe.pth", "not a regular file", force=True)
    refused(Path("/dev/full"), "not a regular file", force=True)
    refused(tmp_path / "o.onnx", r"give a name that ends in \.pth")
    refused(tmp_path / "o.pth", r"give a name that ends in \.pkl", to="detectron2")
    refused(tmp_path / "o.pth", r"give a name that ends in \.safetensors", to="safetensors")
    check_output("torchvision", there, force=True, source=tmp_path / "other.pth")
    check_output("torchvision", tmp_path / "new.pth", force=False)
    check_output("moco", tmp_path / "new.pth", force=False, with_projector=True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(tmp_path / "o.pth", "cannot be written")


# ---- the script

def run_here(*arguments):
    """The script as ``__main__`` in this process, which is much faster: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["export.py", *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / "export.py"), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def test_the_script(tmp_path, sources, images):
    weights, model, head, _ = sources("resnet_small cifar")
    data = tmp_path / "data"
    data.mkdir()
    for i in range(3):
        Image.effect_noise((80, 70), 40 + i).save(data / f"{i}.png")
    out = tmp_path / "o.pth"
    common = ("--weights", weights, "--to", "torchvision", "--output", out)
    done = script("export.py", *common, "--with-projector", "--data", data)
    assert (done.rc, done.err) == (0, "")
    *report, summary, code, projector_code = done.out.splitlines()
    assert " ".join(report).startswith(f"{weights}: ")
    assert "(CoSS layout, all " in report[-1]
    assert "compared on 4 random and 3 real images: largest difference 0 of" in summary
    assert "the network needs the 3x3 stem" in summary
    scope = {}
    for line in (code, projector_code):
        exec(line, scope)
    with torch.no_grad():
        assert torch.equal(scope["projector"](scope["model"](images)), head(model(images)))

    code, printed, error = run_here(*common)
    assert (code, printed) == (2, "")
    assert error.startswith(f"error: --output {out} exists")
    assert error.count("\n") == 1

    code, printed, error = run_here(*common, "--force", "--json")
    assert (code, error) == (0, "")
    record = json.loads(printed)
    assert (record["images"], record["difference"], record["path"]) == ({"random": 4, "rendered": 8}, 0, str(out))
    assert record["bytes"] == out.stat().st_size
    assert record["source"]["arch"] == "resnet_small"


@pytest.mark.parametrize(("count", "words"), [
    (0, "at least 1 and at most 4096"), (4097, "at least 1 and at most 4096"), (9, "and 2 real images")])
def test_how_many_images(tmp_path, sources, count, words):
    for i in range(2):
        Image.effect_noise((40, 40), 40 + i).save(tmp_path / f"{i}.png")
    code, printed, error = run_here("--weights", sources("resnet_small")[0], "--to", "torchvision", "--output",
                                    tmp_path / "o.pth", "--data", tmp_path, "--images", str(count))
    assert (code, words in printed + error) == (0 if count == 9 else 2, True), error


def test_a_teacher_of_mocos_with_its_head(tmp_path, sources, images):
    _, model, head, _ = sources("resnet_small")
    teacher = tmp_path / "moco.pth.tar"
    state = {f"module.encoder_q.{k}": v for k, v in model.state_dict().items()}
    state |= {f"module.encoder_q.fc.{k}": v for k, v in head.state_dict().items()}
    torch.save({"epoch": 2, "arch": "resnet_small", "state_dict": {**state, "module.queue": torch.ones(3, 9)}}, teacher)
    code, printed, error = run_here("--weights", teacher, "--to", "torchvision", "--output", tmp_path / "o.pth",
                                    "--with-projector", "--json", "--image-size", SIZE)
    assert (code, error) == (0, "")
    loaded = build("resnet_small")
    loaded.load_state_dict(torch.load(tmp_path / "o.pth", weights_only=True))
    projector = torch.load(json.loads(printed)["projector"], weights_only=True)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert all(torch.equal(value, projector[name]) for name, value in head.state_dict().items())


def test_a_file_without_a_projector(tmp_path, sources):
    torch.save(sources("resnet_small")[1].state_dict(), tmp_path / "bare.pth")
    code, _, error = run_here("--weights", tmp_path / "bare.pth", "--to", "torchvision", "--output",
                              tmp_path / "o.pth", "--with-projector")
    assert code == 2
    assert "has no head; give" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bare.pth"]


@pytest.mark.parametrize("to", ["timm", "safetensors"])
def test_a_transformers_size_and_feature_go_along(to, tmp_path):
    pytest.importorskip(to)
    trunk = build_backbone("vit_ti_16", image_size=48, feature="cls+mean")
    state = {f"backbone.{name}": value for name, value in trunk.state_dict().items()}
    torch.save({**trunk.spec.record(), "state_dict": state}, tmp_path / "student.pth")
    encoder, report = load_frozen(tmp_path / "student.pth")
    path = tmp_path / f"out{TARGETS[to].suffix}"
    done = export(Network.of(encoder, report), to, path, {"random": torch.randn(2, 3, 48, 48)})  # by the printed line
    assert done.difference <= done.tolerance
    again = load_frozen(path)[0].backbone.spec
    assert again.image_size == 48
    assert again.feature == {"timm": "cls", "safetensors": "cls+mean"}[to]  # a bare state dict records none
