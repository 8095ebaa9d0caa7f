"""Weights by name: from caches that the test fills, and, where nothing is there, a sentence that says what to do."""

import hashlib
import json
import socket
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from helpers.sources import _no_initialisation, randomise  # noqa: F401

from checkpoints import by_name
from checkpoints.by_name import folder_beside, locate, sha256_of, short_name
from checkpoints.frozen import load_frozen
from checkpoints.reader import read_checkpoint
from common.evaluation import student_names
from models.backbones import build_backbone
from runtime.errors import UserError

SHUFFLENET = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
NAME = "torchvision:ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1"
TIMM = "timm:test_vit.r160_in1k"


@pytest.fixture(autouse=True)
def _looked_up_anew():
    by_name._fetched.cache_clear()


@pytest.fixture
def torch_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch/hub/checkpoints"


@pytest.fixture
def released(tmp_path, monkeypatch, torch_cache):
    """Weights that torchvision has "released", at an address on this machine; the hash in their name is true."""
    weights = randomise(torchvision.models.shufflenet_v2_x0_5()).state_dict()
    torch.save(weights, tmp_path / "file.pth")
    digest = hashlib.sha256((tmp_path / "file.pth").read_bytes()).hexdigest()
    path = (tmp_path / "file.pth").rename(tmp_path / f"shufflenetv2_x0.5-{digest[:10]}.pth")
    monkeypatch.setattr(SHUFFLENET.value, "url", path.as_uri())
    return path, weights, digest


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of huggingface_hub that is used offline: a function that puts files of a model into it."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="pip install huggingface_hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def fill(model, revision="main", commit="c0ffee" + "0" * 34):
        place = tmp_path / "hub" / f"models--{model.replace('/', '--')}"
        (place / "snapshots" / commit).mkdir(parents=True)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(commit)
        return place / "snapshots" / commit

    return fill


def test_torchvisions_file_is_fetched_once_and_read_as_its_architecture(released, torch_cache):
    path, weights, digest = released
    encoder, report = load_frozen(NAME)
    assert (report.arch, report.file, report.sha256) == (
        "shufflenet_v2_x0_5", str(torch_cache / path.name), digest)
    assert torch.equal(encoder.backbone.conv5[0].weight, weights["conv5.0.weight"])
    path.unlink()
    by_name._fetched.cache_clear()
    assert load_frozen(NAME)[1].sha256 == digest  # without a network
    assert list(torch_cache.iterdir()) == [torch_cache / path.name]


def test_a_file_that_is_not_what_its_name_says_is_refused(released, torch_cache):
    path, *_ = released
    torch_cache.mkdir(parents=True)
    (torch_cache / path.name).write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"^--distill torchvision:Shuffle.*is damaged or another file.*remove it"):
        load_frozen(NAME, flag="--distill")
    (torch_cache / path.name).unlink()
    path.write_bytes(b"another")
    with pytest.raises(UserError, match="could not be downloaded .invalid hash value.*put it at"):
        load_frozen(NAME)
    assert list(torch_cache.iterdir()) == []


def test_without_a_network_the_address_and_the_place_are_named(released, torch_cache):
    path, *_ = released
    path.unlink()
    with pytest.raises(UserError) as refused:
        load_frozen(NAME)
    assert path.as_uri() in str(refused.value) and f"put it at {torch_cache / path.name}" in str(refused.value)


def test_an_address_that_does_not_answer_is_given_up(released, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        monkeypatch.setattr(SHUFFLENET.value, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/file.pth")
        monkeypatch.setattr(by_name, "SILENCE", 0.2)
        with pytest.raises(UserError, match=r"file.pth could not be downloaded .timed out.*put it at"):
            load_frozen(NAME)
    assert socket.getdefaulttimeout() is None


def test_a_process_that_waited_for_another_does_not_fetch_again(released, torch_cache, monkeypatch):
    path, *_ = released

    def the_other_one_has_it(file, how):
        (torch_cache / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(by_name.fcntl, "flock", the_other_one_has_it)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("downloaded again"))
    assert locate(NAME, "--weights") == (torch_cache / path.name, "shufflenet_v2_x0_5")


@pytest.mark.parametrize(("name", "says"), {
    "torchvision:ResNet50_Weights.V9": "for resnet50 give one of torchvision:ResNet50_Weights.IMAGENET1K_V1",
    "torchvision:resnet50": "give one of", "torchvision:ResNet51_Weights.V1": "mean ResNet",
    "torchvision:FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1": "not one of torchvision's weights of a classifier",
    "hf:dinov2-small": "give hf:OWNER/NAME", "hf:../../etc/passwd": "give hf:OWNER/NAME"}.items())
def test_names_that_are_none(name, says):
    with pytest.raises(UserError, match=says) as refused:
        load_frozen(name)
    assert str(refused.value).startswith(f"--weights {name} is not ")


@pytest.mark.parametrize(("name", "says"), {
    "timm:test_vit.v9": r"no weights of that tag, only test_vit\.r160_in1k; give", "timm:test_vitt": "mean test_vit",
    "timm:test_vit4": "no pretrained weights|is not in the cache"}.items())
def test_names_that_timm_has_no_weights_of(name, says, hub):
    pytest.importorskip("timm", reason="pip install timm")
    with pytest.raises(UserError, match=says):
        load_frozen(name)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_timms_file_is_read_as_the_network_of_that_name(hub, file):
    timm = pytest.importorskip("timm", reason="pip install timm")
    weights = randomise(timm.create_model("test_vit")).state_dict()
    path = hub("timm/test_vit.r160_in1k") / file
    if file.endswith(".bin"):
        torch.save(weights, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(weights, path)
    for name in (TIMM, "timm:test_vit"):  # the only tag is the default
        encoder, report = load_frozen(name)
        assert (report.arch, report.file, report.image_size) == (TIMM, str(path), 160)
        assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.equal(encoder.backbone.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"])


def test_a_model_of_the_hub_in_parts_and_of_a_revision(hub):
    save_file = pytest.importorskip("safetensors.torch", reason="pip install safetensors").save_file
    weights = {k: v.contiguous() for k, v in randomise(build_backbone("resnet18")).state_dict().items()}
    folder = hub("me/mine", "v2")
    parts = {f"model-0000{i}-of-00002.safetensors": dict(list(weights.items())[i - 1::2]) for i in (1, 2)}
    for name, tensors in parts.items():
        save_file(tensors, folder / name)
    table = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    both = b"".join((folder / name).read_bytes() for name in parts)
    encoder, report = load_frozen("hf:me/mine@v2")
    assert (report.file, report.mean, report.std) == (str(folder), [0.5] * 3, [0.25] * 3)
    assert report.sha256 == sha256_of("hf:me/mine@v2", "") == hashlib.sha256(both).hexdigest()
    assert torch.equal(encoder.backbone.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])
    with pytest.raises(UserError, match="run hf download me/mine and copy models--me--mine from"):
        read_checkpoint("hf:me/mine")  # main is another revision


@pytest.mark.parametrize(("tag", "arch"), [("r160_in1k", TIMM), ("mine", "timm:test_vit")])
def test_a_model_of_timms_on_the_hub_is_what_its_config_says(hub, tag, arch):
    timm = pytest.importorskip("timm", reason="pip install timm")
    folder = hub("timm/test_vit.r160_in1k")
    torch.save(randomise(timm.create_model("test_vit")).state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"architecture": "test_vit", "pretrained_cfg": {
        "tag": tag, "mean": [0.25] * 3, "std": [0.75] * 3}}))
    _, report = load_frozen("hf:timm/test_vit.r160_in1k")
    assert (report.arch, report.mean, report.std) == (arch, [0.25] * 3, [0.75] * 3)


def test_offline_a_sentence_names_the_files_and_the_cache(hub, tmp_path):
    with pytest.raises(UserError) as refused:
        load_frozen("hf:facebook/dinov2-small", flag="--distill")
    said = str(refused.value)
    assert said.startswith("--distill hf:facebook/dinov2-small: model.safetensors or pytorch_model.bin or open_")
    assert f"not in the cache {tmp_path / 'hub'} and HF_HUB_OFFLINE is set" in said
    assert said.endswith("into a folder and give that folder")


@pytest.mark.parametrize(("kind", "says"), {
    "GatedRepoError": "x requires accepting its licence; do that there, and log in",
    "RepositoryNotFoundError": "x does not exist or is private; check the name", "RevisionNotFoundError":
    "x has no revision v9; give a branch", "HFValidationError": "x could not be downloaded .*; try again, or download",
    "": "x is not in the cache .* and the hub has none, or cannot be reached; on a machine"}.items())
def test_what_the_hub_answers(kind, says, hub, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants, errors

    empty = hub("me/x")

    def answer(*_, **__):
        if kind:
            raise getattr(errors, kind).__new__(getattr(errors, kind))
        return empty

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    with pytest.raises(UserError, match=f"^--distill hf:me/x@v9: .*https://huggingface.co/me/{says}"):
        load_frozen("hf:me/x@v9", flag="--distill")


@pytest.mark.parametrize("name", ["hf:facebook/dinov2-small", TIMM])
def test_without_huggingface_hub_a_sentence_says_so(name, monkeypatch):
    if name == TIMM:
        pytest.importorskip("timm", reason="pip install timm")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub`, or download model.safetensors .*https://hugging"):
        load_frozen(name)


def test_nothing_is_written_into_a_cache_by_default():
    names = ["hf:facebook/dinov2-small", NAME, TIMM, "run/student.pth", "weights/moco.pth"]
    assert [folder_beside(name) for name in names] == [*[Path()] * 3, Path("run"), Path("weights")]
    assert student_names(names, None) == [
        "dinov2-small", "ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1", "test_vit.r160_in1k", "run", "moco"]
    assert short_name("x/moco.v2.pth") == "moco.v2"
