"""scripts/detection: its configurations, and that exported files have the names and shapes of detectron2's networks.

detectron2 is seldom there where tests run: what they need to know of it is written down here. Where it is installed,
the last test builds its networks and loads the files into them.
"""

import functools
import importlib.util
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from checkpoints.conversion import export
from checkpoints.frozen import load_frozen
from checkpoints.targets import Network
from runtime.errors import UserError

yaml = pytest.importorskip("yaml", reason="reads the configurations; pip install pyyaml")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/detection/train.py"
CONFIGS = sorted(SCRIPT.with_name("configs").glob("*.yaml"))
DEPTHS = (18, 34, 50)

# The settings in detectron2/config/defaults.py that are used here, and what kind of value they have.
KINDS = {
    "VERSION": int, "MODEL.PIXEL_MEAN": list, "MODEL.PIXEL_STD": list, "MODEL.META_ARCHITECTURE": str,
    "MODEL.MASK_ON": bool, "MODEL.BACKBONE.NAME": str, "MODEL.BACKBONE.FREEZE_AT": int, "MODEL.RESNETS.DEPTH": int,
    "MODEL.RESNETS.NORM": str, "MODEL.RESNETS.STRIDE_IN_1X1": bool, "MODEL.RESNETS.RES2_OUT_CHANNELS": int,
    "MODEL.RESNETS.OUT_FEATURES": list, "MODEL.FPN.IN_FEATURES": list, "MODEL.FPN.NORM": str,
    "MODEL.ANCHOR_GENERATOR.SIZES": list, "MODEL.RPN.IN_FEATURES": list, "MODEL.RPN.PRE_NMS_TOPK_TRAIN": int,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": int, "MODEL.RPN.POST_NMS_TOPK_TRAIN": int, "MODEL.RPN.POST_NMS_TOPK_TEST": int,
    "MODEL.ROI_HEADS.NAME": str, "MODEL.ROI_HEADS.IN_FEATURES": list, "MODEL.ROI_HEADS.NUM_CLASSES": int,
    "MODEL.ROI_BOX_HEAD.NAME": str, "MODEL.ROI_BOX_HEAD.NUM_FC": int, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": int,
    "MODEL.ROI_MASK_HEAD.NAME": str, "MODEL.ROI_MASK_HEAD.NUM_CONV": int,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": int, "INPUT.FORMAT": str, "INPUT.MIN_SIZE_TRAIN": list,
    "INPUT.MIN_SIZE_TEST": int, "INPUT.MAX_SIZE_TRAIN": int, "INPUT.MAX_SIZE_TEST": int, "DATASETS.TRAIN": list,
    "DATASETS.TEST": list, "SOLVER.IMS_PER_BATCH": int, "SOLVER.BASE_LR": float, "SOLVER.STEPS": list,
    "SOLVER.MAX_ITER": int, "SOLVER.WARMUP_ITERS": int, "TEST.PRECISE_BN.ENABLED": bool,
}
DATA = {  # of each data set: classes, masks, steps, images a step
    "voc": (20, False, 24_000, 16), "coco_1x": (80, True, 90_000, 16), "coco_2x": (80, True, 180_000, 16),
    "cityscapes": (8, True, 24_000, 8),
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_in_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def settings(path):
    """A file with what its _BASE_ files say, by full names, later files going before earlier ones, as in fvcore."""
    def flat(tree, prefix=""):
        for key, value in tree.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    content = yaml.safe_load(path.read_text())
    bases = content.pop("_BASE_", [])
    merged = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged |= settings(path.parent / base)
    return merged | dict(flat(content))


def test_every_combination_has_a_configuration():
    assert [path.stem for path in CONFIGS] == sorted(
        f"{data}_r{depth}_{head}" for data in DATA for depth in DEPTHS for head in ("c4", "fpn"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations(path):
    found = settings(path)
    wrong = {name: value for name, value in found.items() if name not in KINDS or type(value) is not KINDS[name]}
    assert not wrong
    data, depth, head = path.stem.rsplit("_", 2)
    classes, masks, steps, images = DATA[data]
    assert found["MODEL.RESNETS.DEPTH"] == int(depth[1:])
    assert found["MODEL.RESNETS.RES2_OUT_CHANNELS"] == (256 if depth == "r50" else 64)
    assert (found["MODEL.ROI_HEADS.NUM_CLASSES"], found["MODEL.MASK_ON"]) == (classes, masks)
    assert (found["SOLVER.MAX_ITER"], found["SOLVER.IMS_PER_BATCH"]) == (steps, images)
    assert found["SOLVER.STEPS"] == sorted(found["SOLVER.STEPS"])
    assert found["SOLVER.STEPS"][-1] < steps
    assert found["MODEL.ROI_HEADS.NAME"] == ("Res5NormROIHeads" if head == "c4" else "StandardROIHeads")
    assert (found["MODEL.RESNETS.NORM"], found["MODEL.BACKBONE.FREEZE_AT"]) == ("naiveSyncBN", 0)
    levels = len(found.get("MODEL.RPN.IN_FEATURES", ["res4"]))
    assert len(found.get("MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64, 128, 256, 512]])) == levels


def layout(depth, res2):
    """Names and shapes of a ResNet in detectron2 (modeling/backbone/resnet.py: BasicStem, BasicBlock, BottleneckBlock,
    build_resnet_backbone), built with DEPTH and RES2_OUT_CHANNELS, its norms' counters left out."""
    shapes = {}

    def conv(name, inputs, outputs, kernel):
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        shapes.update({f"{name}.norm.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")})

    conv("stem.conv1", 3, 64, 7)
    inputs, outputs, middle = 64, res2, 64
    for stage, blocks in zip((2, 3, 4, 5), {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}[depth], strict=True):
        for block in range(blocks):
            at = f"res{stage}.{block}"
            if inputs != outputs:
                conv(f"{at}.shortcut", inputs, outputs, 1)
            if depth < 50:
                conv(f"{at}.conv1", inputs, outputs, 3)
                conv(f"{at}.conv2", outputs, outputs, 3)
            else:
                conv(f"{at}.conv1", inputs, middle, 1)
                conv(f"{at}.conv2", middle, middle, 3)
                conv(f"{at}.conv3", middle, outputs, 1)
            inputs = outputs
        outputs, middle = 2 * outputs, 2 * middle
    return shapes


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """depth -> a file for detectron2 of a student of that depth, made once."""
    folder = tmp_path_factory.mktemp("exported")

    @functools.cache
    def make(depth):
        model = torchvision.models.get_model(f"resnet{depth}")
        model.fc = torch.nn.Identity()
        torch.save({"arch": f"resnet{depth}", "image_size": 32, "state_dict": {
            f"backbone.{name}": value for name, value in model.state_dict().items()}}, folder / "student.pth")
        encoder, report = load_frozen(folder / "student.pth")
        path = folder / f"resnet{depth}.pkl"
        export(Network(encoder.backbone, None, report), "detectron2", path, {"random": torch.randn(1, 3, 32, 32)})
        return path
    return make


@pytest.mark.parametrize("depth", DEPTHS)
def test_exported_names_and_shapes_are_those_of_detectron2s_network(exported, depth):
    with exported(depth).open("rb") as file:
        content = pickle.load(file, encoding="latin1")
    for path in CONFIGS:
        found = settings(path)
        if found["MODEL.RESNETS.DEPTH"] != depth:
            continue
        shapes = {name: array.shape for name, array in content["model"].items()}
        assert shapes == layout(depth, found["MODEL.RESNETS.RES2_OUT_CHANNELS"])
        told = {name: value for name, value in content["settings"].items() if name in found}
        assert {"MODEL.RESNETS.DEPTH", "MODEL.RESNETS.STRIDE_IN_1X1", "MODEL.PIXEL_STD", "INPUT.FORMAT"} <= told.keys()
        assert told == {name: found[name] for name in told}  # the default normalisation is ImageNet's
    assert content["settings"].keys() - KINDS.keys() == {"MODEL.RESNETS.NUM_GROUPS", "MODEL.RESNETS.WIDTH_PER_GROUP"}


def test_weights_that_find_no_place_are_noticed(script):
    weights = {"stem.conv1.weight": np.ones((2, 3), np.float32), "res5.0.conv1.weight": np.zeros(4, np.float32)}
    state = {"backbone.stem.conv1.weight": torch.ones(2, 3), "roi_heads.res5.0.conv1.weight": torch.zeros(4)}
    assert script.not_loaded(state, weights) == []
    assert script.not_loaded({**state, "roi_heads.res5.0.conv1.weight": torch.ones(4)}, weights) == [
        "res5.0.conv1.weight"]
    assert script.not_loaded({"backbone.mystem.conv1.weight": torch.ones(2, 3)}, weights) == list(weights)
    other = {"backbone.stem.conv1.weight": torch.ones(2, 2), "roi_heads.res5.0.conv1.weight": torch.zeros(4)}
    assert script.not_loaded(other, weights) == ["stem.conv1.weight"]


def test_bad_input(script, tmp_path, exported):
    with pytest.raises(UserError, match="--config voc_r19_c4 is neither a file nor one of cityscapes_r18_c4, .*voc"):
        script.find_config("voc_r19_c4")
    assert script.find_config("voc_r18_c4") == SCRIPT.parent / "configs/voc_r18_c4.yaml"
    torch.save({"state_dict": {}}, tmp_path / "student.pth")
    with pytest.raises(UserError, match="is not a file for detectron2; write one with export.py --to detectron2"):
        script.read_weights(str(tmp_path / "student.pth"))
    told = script.read_weights(str(exported(18)))["settings"]
    script.check_depth("voc_r18_c4", 18, "w.pkl", told)
    script.check_depth("voc_r18_c4", 18, "w.pkl", {})  # a file of MoCo's own conversion
    with pytest.raises(UserError, match="w.pkl is a ResNet-18 and --config voc_r50_c4 is for a ResNet-50"):
        script.check_depth("voc_r50_c4", 50, "w.pkl", told)


def test_without_detectron2_there_is_one_sentence(script, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "voc_r18_c4", "--weights", str(exported(18)), "--output",
                                      str(tmp_path / "o")])
    with pytest.raises(UserError, match="detectron2 is missing; install it as https://"):
        script.main()
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("head", ["c4", "fpn"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_in_detectron2_itself(script, exported, depth, head):
    """Everything arrives in the network that detectron2 builds, and it computes what torchvision's does."""
    pytest.importorskip("detectron2", reason="builds its own networks")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    path = exported(depth)
    weights = script.read_weights(str(path))
    script.define()
    args = script.parse_args(["--config", f"coco_1x_r{depth}_{head}", "--weights", str(path), "--output", "o",
                              "MODEL.DEVICE", "cpu"])
    cfg = script.configure(args, weights["settings"])
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    assert script.not_loaded(model.state_dict(), weights["model"]) == []
    encoder, _ = load_frozen(path, image_size=64)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = (model.roi_heads.res5[:-1](model.backbone(images)["res4"]) if head == "c4" else
                model.backbone.bottom_up(images)["res5"])
        torch.testing.assert_close(maps.mean((2, 3)), encoder.backbone(images), rtol=1e-5, atol=1e-5)
