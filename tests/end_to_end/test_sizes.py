"""A transformer of timm's that sees 32 pixels teaches a convolutional student of 16, from mining to export."""

import json

import pytest
import torch
from helpers.experiment import made_once
from helpers.runs import load, metrics
from helpers.scripts import assert_refused, in_this_process, script, well

ARCH = "timm:vit_tiny_patch16_224"
timm = pytest.importorskip("timm", reason="the teacher is timm's; pip install timm")


FLAGS = ["--device", "cpu", "--workers", 0, "--batch-size", 20]


@pytest.fixture(scope="module")
def files(tree, tmp_path_factory):
    """A teacher's file for images of 224, its neighbours at 32, and weights for the student."""
    def make(folder):
        torch.manual_seed(0)
        model = timm.create_model(ARCH[5:], num_classes=0)
        torch.nn.init.normal_(model.pos_embed)
        torch.save(model.state_dict(), folder / "vit.pth")
        student = timm.create_model("resnet10t", num_classes=0)
        torch.save({"arch": "timm:resnet10t", "mean": [0.5] * 3, "std": [0.25] * 3, "state_dict": {
            f"backbone.{name}": value for name, value in student.state_dict().items()}}, folder / "begin.pth")
        well(in_this_process("compute_knn.py", "mine", "--data", tree / "train", "--weights", folder / "vit.pth",
                             "--arch", ARCH, "--image-size", 32, "--feature", "cls+mean", "--k", 6, "--output", folder,
                             *FLAGS))
    return made_once(tmp_path_factory, "sizes", make)


def distil(files, tree, output, *more, processes=0):
    run = script if processes else in_this_process
    return run("train_distill.py", "--data", tree / "train", "--distill", files / "vit.pth", "-k", ARCH,
               "--image-size", 16, "--closek-info", files / "closek_info.npy", "--nearest-k", 1, "--total-k", 6,
               "--epochs", 1, "--lr", 0.01, "--warmup-epochs", 0, "-p", 1, *FLAGS, "--output", output, *more,
               **({"processes": processes} if processes else {}))


@pytest.fixture(scope="module")
def run(files, tree, tmp_path_factory):
    """Two processes; the student begins with weights; batches go through both networks in parts."""
    return made_once(tmp_path_factory, "sizes-run", lambda folder: well(distil(
        files, tree, folder, "--teacher-image-size", 32, "--teacher-feature", "cls+mean", "--student-weights",
        files / "begin.pth", "--micro-batch", 3, "--head-init", "random", processes=2)))


def test_each_network_sees_its_own_size(run, files):
    config, saved = json.loads((run / "config.json").read_text()), load(run / "student.pth")
    assert [config[name] for name in ("image_size", "teacher_image_size", "feature", "teacher_feature", "student_arch",
                                      )] == [16, 32, "pool", "cls+mean", "timm:resnet10t"]
    assert (saved["image_size"], saved["teacher"]["image_size"], saved["mean"]) == (16, 32, [0.5] * 3)
    assert saved["state_dict"]["proj_head.2.weight"].shape[0] == 384
    assert saved["config"]["student_sha256"] == config["student_sha256"] is not None
    lines = metrics(run)
    assert lines[-1]["row"] < lines[0]["row"]


def test_evaluations_and_exports_know_them_from_the_files(run, files, tree):
    flags = FLAGS[:4]
    found = json.loads(well(in_this_process("compute_knn.py", "eval", "--data", tree, "--weights", run / "student.pth",
                                            "--json", "--k", 5, *flags)).out)
    assert (found["arch"], found["image_size"]) == ("timm:resnet10t", 16)
    well(in_this_process("evaluate.py", "overlap", "--data", tree, "--weights", run / "student.pth", "--teacher",
                         files / "vit.pth", "--picture", "none", "--image-size", 24, *flags))
    record = json.loads((run / "evaluation" / "results.jsonl").read_text().splitlines()[-1])
    assert [(x["image_size"], x["feature"]) for x in record["networks"]] == [
        (32, "cls+mean"), (24, "pool")]  # --image-size is the student's
    done = well(in_this_process("export.py", "--weights", run / "student.pth", "--to", "timm", "--output",
                                run / "out.pth"))
    assert "largest difference" in done.out


def test_other_features_sizes_between_patches_and_another_run_are_refused(run, files, tree):
    more = "--teacher-image-size", 32
    assert_refused(distil(files, tree, run / "new", *more, "--teacher-feature", "mean"),
                   ["closek_info.npy", "'cls+mean', but the current one is 'mean'", "--teacher-feature cls+mean"])
    assert_refused(distil(files, tree, run / "new", "--teacher-image-size", 40), ["--teacher-image-size 32 or 48"])
    assert_refused(distil(files, tree, run, "--teacher-image-size", 48, "--teacher-feature", "cls+mean",
                          "--student-weights", files / "begin.pth"), ["--teacher-image-size was 32, now 48"])
    assert not (run / "new").exists()
