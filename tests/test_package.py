"""The project as an installed package: import coss, its commands, torch.hub, and what pip would pack."""

import importlib
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scripts import script
from PIL import Image
from torchvision.transforms.functional import normalize

import coss
from checkpoints.frozen import load_frozen
from data.augment import eval_transform

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "assets/demo_teacher.pth"


@pytest.fixture(scope="module")
def network():
    return coss.load(TEACHER, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (80, 70 + 9 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_a_folder_images_and_single_tensors_give_the_same_rows(network, photos):
    encoder, report = load_frozen(TEACHER)
    images = [Image.open(photos / name) for name in coss.names(photos)]
    pixels = torch.stack([eval_transform(64)(image).float() / 255 for image in images])
    with torch.no_grad():
        expected = encoder.backbone(normalize(pixels, report.mean, report.std)).numpy()
    assert coss.names(photos) == ["0.png", "1.png", "2.png"]
    found = coss.embed(network, photos, batch_size=2)
    assert (found.dtype, found.shape) == (np.float32, (3, network.width))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(network.embed(images), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(network.embed(images[1])[0], expected[1], rtol=1e-4, atol=1e-4)
    one = network(network.transform(images[2])[None])
    np.testing.assert_allclose(one[0].numpy(), expected[2], rtol=1e-4, atol=1e-4)
    assert network.embed([]).shape == (0, network.width)
    assert "squeezenet1_1" in str(network.report)


def test_what_is_wrong_is_a_user_error(network, photos, tmp_path):
    (tmp_path / "x.png").write_bytes(b"not an image")
    with pytest.raises(coss.UserError, match="x.png is unreadable"):
        network.embed(tmp_path)
    with pytest.raises(coss.UserError, match="weights .*none.pth is not a file"):
        coss.load(tmp_path / "none.pth")
    with pytest.raises(coss.UserError, match="--sampler cf needs --closek-info"):
        coss.distill(data=str(photos), distill=str(TEACHER), output=str(tmp_path / "run"))
    with pytest.raises(AttributeError, match="no attribute lod"):
        coss.lod  # noqa: B018


def test_keywords_are_flags():
    from coss.network import words
    assert words({"data": "d", "nearest_k": 3, "head_bn": True, "cos": "false", "compile": False, "ema": None,
                  "schedule": [1, 2]}) == ["--data", "d", "--nearest-k", "3", "--head-bn", "--cos", "false",
                                           "--schedule", "1", "2"]


def test_another_package_of_one_of_its_names_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "losses", types.SimpleNamespace(__file__="/elsewhere/losses/__init__.py"))
    with pytest.raises(ImportError, match="coss needs its own package losses, but another one is imported"):
        coss.add_root()


def test_torch_hub(photos):
    network = torch.hub.load(str(ROOT), "student", str(TEACHER), source="local", device="cpu")
    assert network.embed(photos).shape == (3, 512)


def test_importing_costs_nothing(tmp_path):
    code = "import sys, coss; assert 'torch' not in sys.modules and 'losses' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)


def settings():
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pip_packs_every_package_and_each_command_is_a_script():
    packed = set(settings()["tool"]["setuptools"]["packages"])
    ours = {path.parent for name in coss._NAMES for path in (ROOT / name).rglob("*.py")}
    assert packed == {"coss", "coss._root"} | {
        "coss._root." + ".".join(folder.relative_to(ROOT).parts) for folder in ours}
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"hubconf"}
    commands = settings()["project"]["scripts"]
    found = {re.fullmatch(r"coss\.commands:(\w+)", target)[1] for target in commands.values()}
    module = importlib.import_module("coss.commands")
    assert {getattr(module, name).args[0] for name in found} == scripts
    assert all(name == f"coss-{target.partition(':')[2]}" for name, target in commands.items())


def test_a_command_is_its_script(tmp_path):
    program = tmp_path / "coss-pack"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom coss.commands import pack\npack()\n")
    done = script(program, "--data", tmp_path / "none", "--output", tmp_path / "x.pack")
    assert (done.rc, done.out) == (2, "")
    assert done.err.startswith("error: --data ") and done.err.count("\n") == 1
