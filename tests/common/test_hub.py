"""--push-to-hub with a stand-in for the upload, and what is uploaded read back as a folder of the hub."""

import json
import shutil
import sys

import pytest
import torch
from helpers import small  # noqa: F401 - resnet_small

from checkpoints.conversion import export
from checkpoints.frozen import load_frozen
from checkpoints.targets import Network
from common.afterwards import write_trunks
from common.hub import check_push, push, write_card
from models.backbones import build_backbone
from runtime.device import Process
from runtime.errors import UserError

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")
NAME = "me/resnet-coss"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder: the student, config.json, and scores of it and of another file."""
    tmp_path = tmp_path_factory.mktemp("run")
    trunk = build_backbone("resnet_small", "cifar", 32)
    state = {f"backbone.{name}": value for name, value in trunk.state_dict().items()}
    torch.save({**trunk.spec.record(), "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "state_dict": state},
               tmp_path / "student.pth")
    encoder, report = load_frozen(tmp_path / "student.pth")
    teacher = {"arch": "resnet50", "file": "/weights/moco_v2.pth", "sha256": "ab" * 32}
    (tmp_path / "config.json").write_text(json.dumps({
        "data": "/data/photos", "loss": "coss", "epochs": 9, "teacher": teacher,
        "starts": [{"command": "train_distill.py --data=/data/photos --distill /weights/moco_v2.pth --lr 0.1/2"}]}))
    (tmp_path / "evaluation").mkdir()
    lines = [{"command": "knn", "data": "/data/cifar", "sha256": sha, "table": [{"k": 10, "top1": top}]}
             for sha, top in ((report.sha256, 61.25), ("other", 12.5))]
    (tmp_path / "evaluation" / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    out = tmp_path / "out.safetensors"
    export(Network.of(encoder, report), "safetensors", out, {"random": torch.randn(2, 3, 32, 32)})
    return encoder, report, out, write_card(out, NAME, encoder, report, tmp_path)


def test_what_is_pushed_is_read_back(tmp_path, monkeypatch, run):
    encoder, report, out, card = run
    (there := tmp_path / "hub").mkdir()

    def commit(self, repository, operations, **_):
        for one in operations:
            shutil.copy(one.path_or_fileobj, there / one.path_in_repo)

    monkeypatch.setattr(hub, "get_token", lambda: "token")
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, name, exist_ok: f"https://huggingface.co/{name}")
    monkeypatch.setattr(hub.HfApi, "create_commit", commit)
    assert push(NAME, out, card) == f"https://huggingface.co/{NAME}"
    assert {path.name for path in there.iterdir()} == {"model.safetensors", "README.md"}
    again, read = load_frozen(there)
    assert (again.backbone.spec, read.mean) == (encoder.backbone.spec, [0.5, 0.4, 0.3])
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(again(images), encoder(images))
    text = (there / "README.md").read_text()
    for words in ("resnet50, moco_v2.pth, SHA-256 abab", "data: data/photos", "method: coss", "| 10 | 61.25 |",
                  "train_distill.py --data=photos --distill moco_v2.pth --lr 0.1/2", f'coss.load("hf:{NAME}")',
                  "# license:", report.sha256):
        assert words in text
    assert "12.50" not in text
    assert "/data/photos" not in text.partition("## Command")[2]  # which folders a machine has is nobody's business


def test_the_trunk_alone_has_the_scores_of_its_student(run):
    """As a run leaves it beside the student; not where the student has been replaced by another."""
    _, _, out, card = run
    folder = out.parent
    write_trunks(folder, ["student.pth"], "resnet_small", Process(0, 1, torch.device("cpu")))
    encoder, report = load_frozen(folder / "student_trunk.pth", "resnet_small", image_size=32)
    text = write_card(folder / "trunk.safetensors", NAME, encoder, report, folder).read_text()
    assert "| 10 | 61.25 |" in text
    assert "12.50" not in text
    encoder.backbone.conv1.weight.data[0, 0, 0, 0] += 1
    assert "Scores" not in write_card(folder / "trunk.safetensors", NAME, encoder, report, folder).read_text()


@pytest.mark.parametrize(("token", "says"), [(None, "needs a token"), ("token", "cannot be reached .no network")])
def test_what_was_written_stays(monkeypatch, run, token, says):
    _, _, out, card = run

    def unreachable(self, name, exist_ok):
        raise OSError("no network\nat all")

    monkeypatch.setattr(hub, "get_token", lambda: token)
    monkeypatch.setattr(hub.HfApi, "create_repo", unreachable)
    with pytest.raises(UserError, match=says) as error:
        push(NAME, out, card)
    assert f"{out} and {card} are written" in str(error.value)
    assert "\n" not in str(error.value)
    assert out.exists()
    assert card.exists()


def test_refused_before_the_work(tmp_path, monkeypatch):
    out = tmp_path / "o.safetensors"
    for name in ("student", "a/b/c", "me/a b", "me/-x", "https://huggingface.co/me/x"):
        with pytest.raises(UserError, match="not the name of a repository"):
            check_push(name, "safetensors", out, False)
    with pytest.raises(UserError, match="needs --to safetensors"):
        check_push(NAME, "timm", out, False)
    check_push(NAME, "safetensors", out, False)
    (tmp_path / "o.md").touch()
    with pytest.raises(UserError, match="model card beside it"):
        check_push(NAME, "safetensors", out, False)
    check_push(NAME, "safetensors", out, True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        check_push(NAME, "safetensors", out, True)
