"""The real scripts on a tiny rendered tree: one and two processes, twice, interrupted, and given bad input."""

import contextlib
import hashlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import compute_knn
from common import networks
from data.datasets import open_source
from runtime.errors import UserError
from search.rowfile import RowFile

ROOT = Path(__file__).resolve().parent.parent
TEACHER, STUDENT = "shufflenet_v2_x0_5", "squeezenet1_1"  # 1,024 and 512 wide, the second without batch norm
COMMON = ["--device", "cpu", "--image-size", "32", "--workers", "0"]
Done = namedtuple("Done", "rc out err")


def script(name, *arguments, processes=0, cwd=None, timeout=240):
    """Run a script of the repository as a person does; ``processes``: under torchrun."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run([*launcher, str(ROOT / name), *map(str, arguments)], capture_output=True, text=True,
                          cwd=cwd, env=environment, timeout=timeout)
    return Done(done.returncode, done.stdout, done.stderr)


def in_this_process(name, *arguments):
    """Run the same file as ``__main__`` here: a tenth of the time, for the many runs that end before they begin."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return Done(code, out.getvalue(), err.getvalue())


def well(done):
    assert done.rc == 0, done.out + done.err
    return done


def render(path, kind, rng):
    """A 32-pixel JPEG whose class is the direction of its stripes; colour and place are free."""
    y, x = np.mgrid[:32, :32] / 32
    wave = [x, y, x + y, x - y][kind]
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * (4 * wave + rng.random()))
    dark, light = rng.integers(0, 110, 3), rng.integers(140, 255, 3)
    pixels = dark + (light - dark) * wave[..., None] + rng.normal(0, 6, (32, 32, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=92)


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3)):
        for kind, name in enumerate(("across", "down", "fall", "rise")):
            for i in range(count):
                render(root / split / name / f"{split}{i:02d}.jpg", kind, rng)
    return root


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def teacher(tree, work):
    """teacher.pth of a two-epoch MoCo with a tiny queue."""
    well(script("train_teacher.py", "--data", tree / "train", "--arch", TEACHER, "--stem", "cifar", "--output",
                work / "teacher", "-b", 10, "--bn-parts", 2, "--moco-k", 16, "--epochs", 2, "-p", 1, *COMMON))
    return work / "teacher" / "teacher.pth"


@pytest.fixture(scope="session")
def neighbours(tree, work, teacher):
    well(script("compute_knn.py", "mine", "--data", tree / "train", "--weights", teacher, "--output", work / "nn",
                "--k", 12, "--far", "--workers", 0, "--device", "cpu"))
    return work / "nn" / "closek_info.npy"


@pytest.fixture(scope="session")
def distil_flags(tree, teacher, neighbours):
    """A training line without --output: 4 anchors with 3 of their 6 nearest, 10 steps an epoch, 2 epochs."""
    return ["--data", tree / "train", "-a", STUDENT, "-k", TEACHER, "--distill", teacher, "--sampler", "cf",
            "--closek-info", neighbours, "--nearest-k", 3, "--total-k", 6, "-b", 4, "--epochs", 2, "-p", 5,
            "--lr", 0.01, "--image-size", 32, "--device", "cpu"]


@pytest.fixture(scope="session")
def run(work, distil_flags):
    """A whole run, with a worker and k-NN scores."""
    well(script("train_distill.py", *distil_flags, "--output", work / "run", "--workers", 1, "--knn-every", 1))
    return work / "run"


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def metrics(folder, group="train"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["group"] == group]


def assert_same_student(a, b):
    one, two = load(a / "student.pth")["state_dict"], load(b / "student.pth")["state_dict"]
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


# ---- the story


def test_teacher_run_leaves_mocos_layout(teacher):
    folder = teacher.parent
    saved = load(teacher)
    trunk = {k for k in torchvision.models.get_model(TEACHER).state_dict() if not k.startswith("fc.")}
    head = {f"fc.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(saved["state_dict"]) == {f"module.encoder_q.{key}" for key in trunk | head}
    assert (saved["arch"], saved["stem"], saved["image_size"]) == (TEACHER, "cifar", 32)
    assert {path.name.partition(".tfevents")[0] for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "log.txt", "checkpoint.pth", "checkpoint-000000004.pth", "teacher.pth",
        "events.out"}
    assert [line["step"] for line in metrics(folder)] == list(range(1, 9))
    assert load(folder / "checkpoint.pth")["state_dict"]["queue"].shape == (128, 16)


def features_by_torchvision(teacher, tree):
    """Features of the training images in ImageFolder's order, with neither our loader nor our trunk."""
    model = torchvision.models.get_model(TEACHER)
    model.conv1[0] = nn.Conv2d(3, 24, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    model.fc = nn.Identity()
    prefix = "module.encoder_q."
    model.load_state_dict({k[len(prefix):]: v for k, v in load(teacher)["state_dict"].items() if ".fc." not in k})
    return features_of_torchvision(model, tree)


def features_of_torchvision(model, tree):
    """Unit features [n, d] in float64 of tree/train by a torchvision network without its head."""
    from torchvision import transforms as T

    transform = T.Compose([T.Resize(33, interpolation=T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToTensor(),
                           T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    folder = torchvision.datasets.ImageFolder(tree / "train", transform)
    with torch.no_grad():
        features = model.eval()(torch.stack([image for image, _ in folder])).double()
    return torch.nn.functional.normalize(features, dim=1)


def test_mined_neighbours_are_the_nearest(teacher, neighbours, tree):
    features = features_by_torchvision(teacher, tree)
    similarity = features @ features.T
    for name, sign in (("closek_info", 1), ("fark_info", -1)):
        ids = np.load(neighbours.with_name(f"{name}.npy"), allow_pickle=False)
        assert ids.dtype == np.int64
        assert ids.shape == (40, 12)
        ranked = (sign * similarity).masked_fill(torch.eye(40, dtype=torch.bool), -torch.inf)
        best = ranked.sort(dim=1, descending=True).values[:, :12]
        found = ranked.gather(1, torch.from_numpy(ids))
        torch.testing.assert_close(found, best, rtol=0, atol=2e-6)  # equal up to rounding of near ties
        assert all(len(set(row)) == 12 and i not in row for i, row in enumerate(ids.tolist()))
    twin = json.loads(neighbours.with_suffix(".json").read_text())
    assert twin["teacher_sha256"] == hashlib.sha256(teacher.read_bytes()).hexdigest()
    names = [str(Path(path).relative_to(tree / "train")) for path, _ in
             torchvision.datasets.ImageFolder(tree / "train").samples]
    assert twin["fingerprint"] == hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()
    assert (twin["teacher_arch"], twin["images"], twin["k"], twin["image_size"]) == (TEACHER, 40, 12, 32)


def test_what_a_run_leaves(run, teacher):
    assert {path.name.partition(".tfevents")[0] for path in run.iterdir()} == {
        "config.json", "metrics.jsonl", "log.txt", "checkpoint.pth", "checkpoint-000000010.pth", "student.pth",
        "events.out"}
    config = json.loads((run / "config.json").read_text())
    assert config["student_arch"] == STUDENT
    assert config["teacher_sha256"] == hashlib.sha256(teacher.read_bytes()).hexdigest()
    lines = metrics(run)
    assert [(line["step"], line["epoch"]) for line in lines] == [(5, 0), (10, 0), (15, 1), (20, 1)]
    for line in lines:
        assert {"loss", "row", "space", "lr", "images_per_second", "data_wait", "student_norm", "dim_correlation",
                } <= set(line)
        assert line["loss"] == pytest.approx(line["row"] + line["space"], rel=1e-4)
        assert line["lr"] == 0.01  # the original's warm-up holds the base rate for five epochs
        assert 0 <= line["data_wait"] <= 1
    assert lines[-1]["loss"] < lines[0]["loss"]
    scores = metrics(run, "knn")
    assert [line["step"] for line in scores] == [10, 20]
    assert all(0 <= line["top1"] <= 100 for line in scores)
    log = (run / "log.txt").read_text()
    assert hashlib.sha256(teacher.read_bytes()).hexdigest()[:16] in log
    assert "MoCo layout" in log


def test_tensorboard_events_hold_the_metrics(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    curve = events.Scalars("train/loss")
    assert [event.step for event in curve] == [5, 10, 15, 20]
    assert [event.value for event in curve] == pytest.approx([line["loss"] for line in metrics(run)], rel=1e-6)
    assert "knn/top1" in events.Tags()["scalars"]


def test_the_student_file(run):
    saved = load(run / "student.pth")
    full = torchvision.models.get_model(STUDENT).state_dict()
    trunk = {f"backbone.{k}" for k in full if not k.startswith("classifier.")}
    head = {f"proj_head.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(saved["state_dict"]) == trunk | head
    assert saved["state_dict"]["proj_head.0.weight"].shape == (2048, 512)
    assert saved["state_dict"]["proj_head.2.weight"].shape == (1024, 2048)
    assert (saved["arch"], saved["stem"], saved["image_size"]) == (STUDENT, "imagenet", 32)
    assert saved["teacher"]["arch"] == TEACHER
    resume = load(run / "checkpoint.pth")
    assert {"state_dict", "updater", "random", "config", "epoch", "steps"} <= set(resume)
    assert (resume["epoch"], resume["steps"]) == (2, 20)
    for key, value in saved["state_dict"].items():
        assert torch.equal(value, resume["state_dict"][key])


def test_the_same_command_again_gives_the_same_student(run, distil_flags, tmp_path):
    well(script("train_distill.py", *distil_flags, "--output", tmp_path / "again", "--workers", 1, "--knn-every", 1))
    assert_same_student(run, tmp_path / "again")
    changing = {"images_per_second", "data_wait"}
    strip = [[{k: v for k, v in line.items() if k not in changing} for line in metrics(folder)]
             for folder in (run, tmp_path / "again")]
    assert strip[0] == strip[1]


def test_an_interrupted_run_goes_on_to_the_same_student(run, distil_flags, tmp_path, monkeypatch):
    """Cut short in the middle of its second epoch, started again: to the bit what the straight run gives.

    Without workers and k-NN scores, which must make no difference either.
    """
    from runtime.loop import Trainer

    output, whole_epoch = tmp_path / "cut", Trainer.epoch

    def interrupted(self, epoch, step_of):
        if epoch == 0:
            return whole_epoch(self, epoch, step_of)
        left = [4]

        def step(batch):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return step_of(batch)

        return whole_epoch(self, epoch, step)

    flags = [*distil_flags, "--output", output, "--workers", 0, "-p", 2]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "epoch", interrupted)
        assert in_this_process("train_distill.py", *flags).rc == 130
    assert load(output / "checkpoint.pth")["epoch"] == 1
    assert [line["step"] for line in metrics(output)] == [2, 4, 6, 8, 10, 12, 14]
    flags = [*distil_flags, "--output", output, "--workers", 0, "-p", 5]
    done = well(script("train_distill.py", *flags))
    assert "going on from" in done.out
    assert [line["step"] for line in metrics(output)] == [2, 4, 6, 8, 10, 15, 20]
    assert_same_student(run, output)
    one, two = load(run / "checkpoint.pth")["updater"], load(output / "checkpoint.pth")["updater"]
    for key, state in one["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], two["optimizer"]["state"][key]["momentum_buffer"])


def test_a_finished_run_started_again_is_left_as_it_is(run, distil_flags, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    before = (copy / "student.pth").read_bytes()
    well(in_this_process("train_distill.py", *distil_flags, "--output", copy, "--workers", 0, "--knn-every", 1))
    assert (copy / "student.pth").read_bytes() == before
    assert [line["step"] for line in metrics(copy)] == [5, 10, 15, 20]


def test_eval_prints_one_json_object(run, tree, work):
    done = well(script("compute_knn.py", "eval", "--data", tree, "--weights", run / "student.pth", "--k", 3, 10,
                       "--json", "--features", work / "features", "--workers", 0, "--device", "cpu"))
    assert done.out.count("\n") == 1
    found = json.loads(done.out)
    assert (found["arch"], found["train_images"], found["test_images"], found["classes"]) == (STUDENT, 40, 12, 4)
    assert [(row["k"], row["T"]) for row in found["knn"]] == [(3, 0.07), (10, 0.07)]
    assert all(row["top5"] == 100 for row in found["knn"])
    again = in_this_process("compute_knn.py", "eval", "--data", tree, "--weights", run / "student.pth", "--k", 3, 10,
                            "--json", "--features", work / "features", "--workers", 0, "--device", "cpu")
    assert json.loads(again.out) == found
    fresh = in_this_process("compute_knn.py", "eval", "--data", tree, "--weights", run / "student.pth", "--k", 3, 10,
                            "--json", "--features", "none", "--workers", 0, "--device", "cpu")
    assert json.loads(fresh.out) == found
    assert len(list((work / "features").glob("*.npy"))) == 2


def test_eval_against_torchvision(tree, work):
    """A network with well spread features, so that no vote hangs on the last bit; the vote is written here."""
    torch.manual_seed(3)
    model = torchvision.models.resnet18()
    torch.save({"arch": "resnet18", "state_dict": model.state_dict()}, work / "spread.pth")
    done = well(in_this_process("compute_knn.py", "eval", "--data", tree, "--weights", work / "spread.pth", "--k", 10,
                                "--json", "--features", "none", "--image-size", 32, "--workers", 0, "--device", "cpu"))
    model.fc = nn.Identity()
    (work / "swapped").mkdir()
    (work / "swapped" / "train").symlink_to(tree / "val")
    train, test = (features_of_torchvision(model, root) for root in (tree, work / "swapped"))
    labels = torch.arange(4).repeat_interleave(10)
    right = 0
    for row, truth in zip(test @ train.T, torch.arange(4).repeat_interleave(3), strict=True):
        best = row.topk(11)
        votes = torch.zeros(4, dtype=torch.float64)
        for value, i in zip(best.values[:10], best.indices[:10], strict=True):
            votes[labels[i]] += torch.exp(value / 0.07)
        assert best.values[9] - best.values[10] > 1e-6, "the oracle's own vote is open"
        right += int(votes.argmax() == truth)
    assert json.loads(done.out)["knn"][0]["top1"] == pytest.approx(100 * right / 12)


def test_eval_does_not_take_one_folders_features_for_anothers(teacher, tmp_path):
    """train/ and val/ may well hold files of the same names."""
    rng = np.random.default_rng(5)
    for split in ("train", "val"):
        for kind, name in enumerate(("across", "down")):
            for i in range(6):
                render(tmp_path / split / name / f"{i}.jpg", kind, rng)
    flags = ["eval", "--data", tmp_path, "--weights", teacher, "--k", 1, "--json", "--workers", 0, "--device", "cpu"]
    plain = well(in_this_process("compute_knn.py", *flags, "--features", "none"))
    well(in_this_process("compute_knn.py", *flags, "--features", tmp_path / "features"))
    arrays = [np.load(path) for path in (tmp_path / "features").glob("*.npy")]
    assert len(arrays) == 2, "the validation images got the features of the training images"
    assert not np.array_equal(*arrays)
    kept = well(in_this_process("compute_knn.py", *flags, "--features", tmp_path / "features"))
    assert json.loads(kept.out)["knn"] == json.loads(plain.out)["knn"]


# ---- one process and two


@pytest.fixture(scope="session")
def first_steps(work, tree, teacher, neighbours):
    """One step with the row term alone, by one and by two processes: {(sampler, processes): folder}."""
    folders = {}
    for sampler in ("random", "cf"):
        for processes in (0, 2):
            folder = folders[sampler, processes] = work / f"step-{sampler}-{processes}"
            well(script("train_distill.py", "--data", tree / "train", "-a", STUDENT, "--distill", teacher, "--sampler",
                        sampler, "--closek-info", neighbours, "--nearest-k", 1, "--total-k", 3, "-b", 40, "--epochs",
                        1, "-p", 1, "--l_1", 0, "--wd", 0, "--output", folder, *COMMON, processes=processes))
    return folders


@pytest.mark.parametrize("sampler", ["random", "cf"])
def test_two_processes_take_the_same_first_step_as_one(first_steps, sampler):
    """The row term is a mean over rows, and the student has no batch norm: nothing may depend on the processes."""
    one, two = (metrics(first_steps[sampler, processes]) for processes in (0, 2))
    assert len(one) == len(two) == 1
    assert one[0]["row"] == pytest.approx(two[0]["row"], rel=1e-5)
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-5)
    assert one[0]["space"] != pytest.approx(two[0]["space"], rel=1e-4)  # over each process's own batch: it may differ
    # With no weight decay the momentum buffer after one step is the gradient itself.
    gradients = [[state["momentum_buffer"] for _, state in sorted(load(
        first_steps[sampler, processes] / "checkpoint.pth")["updater"]["optimizer"]["state"].items())]
        for processes in (0, 2)]
    assert len(gradients[0]) == len(gradients[1]) > 50
    for a, b in zip(*gradients, strict=True):
        assert a.norm() > 0
        assert (a - b).norm() <= 1e-4 * a.norm()
    states = [load(first_steps[sampler, processes] / "student.pth")["state_dict"] for processes in (0, 2)]
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-4, atol=1e-5)


def test_two_processes_train_and_leave_one_run(distil_flags, work):
    folder = work / "two"
    done = well(script("train_distill.py", *distil_flags, "--output", folder, "--workers", 1, "--knn-every", 2,
                       "--distributed", processes=2))
    assert "2 x cpu" in done.out
    assert "--distributed" in done.out  # accepted, ignored, with a word
    assert {path.name.partition(".tfevents")[0] for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "log.txt", "checkpoint.pth", "checkpoint-000000010.pth", "student.pth",
        "events.out"}
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [5, 10, 15, 20]  # -b counts anchors over all processes
    assert lines[-1]["loss"] < lines[0]["loss"]
    saved = load(folder / "checkpoint.pth")
    assert len(saved["random"]) == 2
    assert not torch.equal(saved["random"][0]["torch"], saved["random"][1]["torch"])
    assert not any(key.startswith("module.") for key in saved["state_dict"])


def test_two_processes_mine_and_score_what_one_does(tree, teacher, neighbours, tmp_path):
    flags = ["--weights", teacher, "--workers", 0, "--device", "cpu", "--features", tmp_path / "features"]
    well(script("compute_knn.py", "mine", "--data", tree / "train", "--output", tmp_path, "--k", 12, "--far", *flags,
                processes=2))
    for name in ("closek_info", "fark_info"):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), np.load(neighbours.with_stem(name)))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".json", ".json", ".npy", ".npy"]
    one, = (tmp_path / "features").glob("*.npy")
    np.testing.assert_allclose(np.load(one), np.load(teacher.parent / "features" / one.name), rtol=1e-4, atol=1e-6)
    two = well(script("compute_knn.py", "eval", "--data", tree, "--k", 5, "--json", *flags,
                       processes=2))
    alone = well(in_this_process("compute_knn.py", "eval", "--data", tree, "--k", 5, "--json", *flags))
    assert json.loads(two.out)["knn"] == json.loads(alone.out)["knn"]


def test_mining_goes_on_after_a_kill(tree, teacher, tmp_path, monkeypatch):
    """With room for one row at a time each row is a block; the second run makes those that the first did not."""
    flags = ["mine", "--data", tree / "train", "--weights", teacher, "--k", 12, "--far", "--workers", 0, "--device",
             "cpu", "--memory", "1e-9", "--output"]
    well(in_this_process("compute_knn.py", *flags, tmp_path / "whole"))
    write, written = RowFile.write, []

    def counted(self, first, rows):
        if len(written) == 25:
            raise KeyboardInterrupt
        write(self, first, rows)
        written.append((self.path.stem, first))

    monkeypatch.setattr(RowFile, "write", counted)
    assert in_this_process("compute_knn.py", *flags, tmp_path / "nn").rc == 130
    assert not list((tmp_path / "nn").glob("*.npy"))
    written.append(None)
    well(in_this_process("compute_knn.py", *flags, tmp_path / "nn"))
    assert len(written) == 1 + 80 + 1, "only the row whose far half was missing is made twice"
    for name in ("closek_info", "fark_info"):
        assert np.array_equal(*(np.load(tmp_path / folder / f"{name}.npy") for folder in ("nn", "whole")))


@pytest.mark.parametrize("metric", ["inner", "l2"])
def test_mining_by_another_metric_in_half_precision(metric, tree, teacher, tmp_path):
    well(in_this_process("compute_knn.py", "mine", "--data", tree / "train", "--weights", teacher, "--output", tmp_path,
                         "--k", 3, "--workers", 0, "--device", "cpu", "--metric", metric, "--dtype", "float16",
                         "--features", tmp_path / "features", "--products", "bf16"))
    path, = (tmp_path / "features").glob("*.npy")
    features = np.load(path)
    assert features.dtype == np.float16
    features = features.astype(np.float64)
    scores = features @ features.T if metric == "inner" else -((features[:, None] - features[None]) ** 2).sum(2)
    np.fill_diagonal(scores, -np.inf)
    found = np.take_along_axis(scores, np.load(tmp_path / "closek_info.npy"), 1)
    rounding = 1e-6 * (features**2).sum(1).max()  # of float32; the features of this teacher lie close together
    np.testing.assert_allclose(found, -np.sort(-scores, 1)[:, :3], rtol=0, atol=rounding)
    assert rounding < np.ptp(scores[np.isfinite(scores)]) / 10
    assert json.loads((tmp_path / "closek_info.json").read_text())["metric"] == metric


def test_an_image_without_features_is_named(tree):
    source = open_source(str(tree / "train"))
    features = torch.ones(6, 3)
    features[4] = 0
    with pytest.raises(UserError) as caught:
        networks.refuse_zero_rows(features, range(2, 6), source)
    assert source.location(4) in str(caught.value)
    networks.refuse_zero_rows(features, range(4), source)


@pytest.mark.parametrize(("lists", "wanted"), [
    ([[range(3)], [range(3)]], [range(3)]), ([[range(3)], []], [range(3)]), ([[], []], []),
    ([[range(5, 7)], [range(2), range(6, 9)]], [range(2), range(5, 9)])])
def test_rows_that_either_file_lacks(lists, wanted):
    assert compute_knn.union_of_ranges(lists) == wanted


def test_a_batch_that_does_not_divide_among_the_processes(distil_flags, tmp_path):
    done = script("train_distill.py", *distil_flags, "-b", 5, "--output", tmp_path / "out", "--workers", 0,
                  processes=2)
    assert done.rc != 0
    said = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert said == ["error: --batch-size 5 does not divide among 2 processes; give 4 or 6"]
    assert not (tmp_path / "out").exists()


# ---- bad input


@pytest.fixture(scope="session")
def bad(tmp_path_factory, tree, teacher):
    """Things to give in the wrong place."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "html.pth").write_text("<!DOCTYPE html><html>404</html>")
    torch.save({"arch": "resnet34", "state_dict": {
        f"module.encoder_q.{k}": v for k, v in torchvision.models.resnet34().state_dict().items()}},
        folder / "resnet34.pth")
    for i in range(12):
        render(folder / "flat" / f"{i}.jpg", i % 4, np.random.default_rng(i))
    (folder / "file").write_text("in the way")
    return folder


# flags replaced or added -> words that the one line on stderr must hold
DISTIL_REFUSALS = {
    "missing data": (["--data", "{bad}/nowhere"], ["--data", "nowhere"]),
    "empty data": (["--data", "{bad}/empty"], ["--data", "empty", "no image"]),
    "unknown student": (["-a", "resnet81"], ["--student_arch resnet81", "resnet18"]),
    "unknown teacher": (["-k", "resnet5O"], ["--teacher-arch resnet5O", "resnet50"]),
    "no such checkpoint": (["--distill", "{bad}/nowhere.pth"], ["--distill", "nowhere.pth"]),
    "web page": (["--distill", "{bad}/html.pth"], ["--distill", "html.pth", "web page"]),
    "checkpoint of another arch": (["--distill", "{bad}/resnet34.pth", "-k", "resnet18"],
                                   ["resnet34.pth", "left over", "resnet18"]),
    "neighbours of another data set": (["--data", "{bad}/flat"], ["--closek-info", "12"]),
    "too few columns": (["--total-k", "13"], ["--closek-info", "12 neighbours", "--total-k", "13"]),
    "nearest-k above total-k": (["--nearest-k", "7"], ["--nearest-k 7", "--total-k 6"]),
    "batch above the images": (["-b", "41"], ["--batch-size 41", "40 images"]),
    "no neighbour file": (["--closek-info", "{bad}/nowhere.npy"], ["--closek-info", "nowhere.npy"]),
    "a checkpoint for neighbours": (["--closek-info", "{teacher}"], ["--closek-info", "teacher.pth"]),
    "stem on patches": (["-a", "swin_t", "--stem", "cifar"], ["--stem cifar", "swin_t"]),
    "subset of nothing": (["--subset", "0.01"], ["--subset 0.01"]),
    "subset above one": (["--subset", "2"], ["--subset 2"]),
    "fp16 on a CPU": (["--amp", "fp16"], ["--amp fp16"]),
    "no such resume file": (["--resume", "{bad}/nowhere.pth"], ["--resume", "nowhere.pth"]),
    "a teacher to resume from": (["--resume", "{teacher}"], ["--resume", "teacher.pth"]),
    "k-NN without labels": (["--data", "{bad}/flat", "--sampler", "random", "--knn-every", "1"], ["--knn-data"]),
    "unknown flag": (["--nearestk", "3"], ["--nearestk"]),
    "no such loss": (["--loss", "nothing"], ["--loss", "coss"]),
}


def assert_refused(done, words):
    assert done.rc == 2, done.err
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err + done.out
    for word in words:
        assert word in done.err


@pytest.mark.parametrize("case", DISTIL_REFUSALS)
def test_train_distill_refuses(case, distil_flags, bad, teacher, tmp_path):
    changed, words = DISTIL_REFUSALS[case]
    changed = [word.format(bad=bad, teacher=teacher) for word in changed]
    done = in_this_process("train_distill.py", *distil_flags, "--output", tmp_path / "out", "--workers", 0, *changed)
    assert_refused(done, words)
    assert not (tmp_path / "out").exists()


def test_a_refusal_from_the_shell(distil_flags, tmp_path):
    """The same from a real shell's point of view: exit code, one line, nothing on stdout."""
    done = script("train_distill.py", *distil_flags, "--output", tmp_path / "out", "--workers", 0, "--data",
                  tmp_path / "nowhere")
    assert_refused(done, ["--data", str(tmp_path / "nowhere")])
    assert done.out == ""
    assert not (tmp_path / "out").exists()


def test_cf_needs_its_file(tree, teacher, tmp_path):
    done = in_this_process("train_distill.py", "--data", tree / "train", "--distill", teacher, "--output",
                           tmp_path / "out", *COMMON)
    assert_refused(done, ["--closek-info", "compute_knn.py mine"])
    assert not (tmp_path / "out").exists()


def test_an_output_folder_of_a_different_run(run, distil_flags, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    done = in_this_process("train_distill.py", *distil_flags, "--output", copy, "--workers", 0, "--lr", 0.02)
    assert_refused(done, ["--output", str(copy), "lr was 0.01, now 0.02", "--resume"])
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_an_output_path_that_is_a_file(distil_flags, bad):
    done = in_this_process("train_distill.py", *distil_flags, "--output", bad / "file", "--workers", 0)
    assert_refused(done, [str(bad / "file")])
    assert (bad / "file").read_text() == "in the way"


MINE_REFUSALS = {
    "missing data": (["--data", "{bad}/nowhere"], ["--data", "nowhere"]),
    "empty data": (["--data", "{bad}/empty"], ["--data", "empty"]),
    "k is all": (["--k", "40"], ["--k 40", "40 images", "39"]),
    "unknown arch": (["--arch", "resnet81"], ["--arch resnet81", "resnet18"]),
    "another arch": (["--arch", "resnet18"], ["teacher.pth", "resnet18", TEACHER]),
    "other stem": (["--stem", "imagenet"], ["teacher.pth", "stem"]),
    "not a checkpoint": (["--weights", "{bad}/html.pth"], ["--weights", "html.pth", "web page"]),
    "wrong key": (["--checkpoint_key", "ema"], ["--checkpoint-key ema", "state_dict"]),
    "untrained what": (["--weights", "untrained"], ["--arch"]),
}


@pytest.mark.parametrize("case", MINE_REFUSALS)
def test_mine_refuses(case, tree, bad, teacher, tmp_path):
    changed, words = MINE_REFUSALS[case]
    done = in_this_process("compute_knn.py", "mine", "--data", tree / "train", "--weights", teacher, "--output",
                           tmp_path / "out", "--k", 5, "--workers", 0, "--device", "cpu",
                           *[word.format(bad=bad) for word in changed])
    assert_refused(done, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changed", "words"), [
    (["--data", "{tree}/train"], ["--data", "val/"]),
    (["--k", "41"], ["--k: 41", "40 training images"]),
    (["--data", "{bad}/flat"], ["--data", "labels"]),
])
def test_eval_refuses(changed, words, tree, bad, teacher):
    done = in_this_process("compute_knn.py", "eval", "--data", tree, "--weights", teacher, "--k", 5, "--workers", 0,
                           "--device", "cpu", "--features", "none",
                           *[word.format(bad=bad, tree=tree) for word in changed])
    assert_refused(done, words)


@pytest.mark.parametrize(("changed", "words"), [
    (["--data", "{bad}/nowhere"], ["--data", "nowhere"]),
    (["--arch", "resnet81"], ["--arch resnet81", "resnet18"]),
    (["-b", "41"], ["--batch-size 41"]),
])
def test_train_teacher_refuses(changed, words, tree, bad, tmp_path):
    done = in_this_process("train_teacher.py", "--data", tree / "train", "--arch", TEACHER, "-b", 10, "--moco-k", 16,
                           "--output", tmp_path / "out", *COMMON, *[word.format(bad=bad) for word in changed])
    assert_refused(done, words)
    assert not (tmp_path / "out").exists()


# ---- broken images, broken numbers


@pytest.fixture
def with_a_broken_image(tmp_path, bad):
    folder = shutil.copytree(bad / "flat", tmp_path / "flat")
    (folder / "5.jpg").write_bytes((folder / "5.jpg").read_bytes()[:200])
    return folder


def random_flags(data, teacher, output):
    return ["--data", data, "-a", STUDENT, "--distill", teacher, "--sampler", "random", "-b", 6, "--epochs", 1,
            "--output", output, *COMMON]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_stops_the_run_by_name(with_a_broken_image, teacher, tmp_path, workers):
    done = in_this_process("train_distill.py", *random_flags(with_a_broken_image, teacher, tmp_path / "out"),
                           "--workers", workers)
    assert_refused(done, [str(with_a_broken_image / "5.jpg"), "--on-bad-image skip"])
    assert not (tmp_path / "out" / "student.pth").exists()


def test_a_broken_image_is_skipped_and_counted(with_a_broken_image, teacher, tmp_path):
    well(in_this_process("train_distill.py", *random_flags(with_a_broken_image, teacher, tmp_path / "out"),
                         "--on-bad-image", "skip"))
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "images that could not be opened: 1, replaced by others 1 times" in log
    assert str(with_a_broken_image / "5.jpg") in log
    assert (tmp_path / "out" / "student.pth").exists()


def test_mining_over_a_broken_image(with_a_broken_image, teacher, tmp_path):
    flags = ["mine", "--data", with_a_broken_image, "--weights", teacher, "--output", tmp_path / "nn", "--k", 3,
             "--workers", 0, "--device", "cpu"]
    assert_refused(in_this_process("compute_knn.py", *flags), [str(with_a_broken_image / "5.jpg")])
    assert not (tmp_path / "nn").exists()
    for _ in range(2):  # the second time from kept features
        done = well(in_this_process("compute_knn.py", *flags, "--on-bad-image", "skip"))
        assert f"1 of 12 images could not be opened and are left out: {with_a_broken_image / '5.jpg'}" in done.out
        assert "3 nearest of 11 images" in done.out
    found = np.load(tmp_path / "nn" / "closek_info.npy")
    assert (found.shape, found.dtype) == ((12, 3), np.int64)
    gone = [path.name for path in sorted(with_a_broken_image.iterdir())].index("5.jpg")
    assert (found[gone] == -1).all()
    well(in_this_process("compute_knn.py", "check", tmp_path / "nn" / "closek_info.npy", "--data", with_a_broken_image))
    # Oracle: the neighbours in the folder without that image.
    shutil.copytree(with_a_broken_image, tmp_path / "others", ignore=lambda *_: ["5.jpg"])
    well(in_this_process("compute_knn.py", "mine", "--data", tmp_path / "others", *flags[3:6], tmp_path / "nn2",
                         *flags[7:]))
    kept = np.delete(np.arange(12), gone)
    assert (found[kept] == kept[np.load(tmp_path / "nn2" / "closek_info.npy")]).all()


def test_features_are_those_of_the_files_as_they_are(with_a_broken_image, teacher, tmp_path):
    """Put back under its name, an image that could not be opened has its own neighbours; so has a changed one."""
    def mined(data, folder):
        done = well(in_this_process("compute_knn.py", "mine", "--data", data, "--weights", teacher, "--output",
                                    tmp_path / folder, "--k", 3, "--workers", 0, "--device", "cpu", "--on-bad-image",
                                    "skip", "--features", tmp_path / "features"))
        return np.load(tmp_path / folder / "closek_info.npy"), done.out

    data = shutil.copytree(with_a_broken_image, tmp_path / "data")
    mined(data, "nn")
    for source in ("3.jpg", "7.jpg"):  # the same name, and then the same size too
        (data / "5.jpg").write_bytes((data / source).read_bytes())
        found, said = mined(data, "nn")
        assert "could not be opened" not in said
        fresh, _ = mined(shutil.copytree(data, tmp_path / source), f"nn-{source}")
        assert (found == fresh).all()


@pytest.mark.parametrize("sampler", ["cf", "cluster", "cluster+cf"])
def test_training_leaves_out_what_mining_left_out(sampler, with_a_broken_image, teacher, tmp_path):
    flags = ["--data", with_a_broken_image, "--weights", teacher, "--output", tmp_path / "nn", "--workers", 0,
             "--device", "cpu", "--on-bad-image", "skip"]
    well(in_this_process("compute_knn.py", "mine", *flags, "--k", 3, "--far"))
    well(in_this_process("compute_knn.py", "cluster", *flags, "--num-clusters", 2))
    said = well(in_this_process("compute_knn.py", "check", tmp_path / "nn" / "clusters_2.pth", "--data",
                                with_a_broken_image)).out
    assert f"1 images could not be opened when it was made, {with_a_broken_image / '5.jpg'} first; training" in said
    sets = ["--sampler", sampler, "--closek-info", tmp_path / "nn" / "closek_info.npy", "--fark-info",
            tmp_path / "nn" / "fark_info.npy", "--cluster-info", tmp_path / "nn" / "clusters_2.pth", "--nearest-k", 2,
            "--total-k", 3, "--epochs", 3, "--batch-size", 2]
    well(in_this_process("train_distill.py", *random_flags(with_a_broken_image, teacher, tmp_path / "out"), *sets))
    log = (tmp_path / "out" / "log.txt").read_text()  # --on-bad-image error: it was never asked for
    assert "1 images that could not be opened when" in log
    assert " of 11 different ones" in log


def assert_stopped(done, output, step):
    assert done.rc == 3, done.err
    assert done.err.count("\n") == 1
    assert done.err.startswith("error: the loss is not finite")
    found = json.loads((output / "nonfinite.json").read_text())
    assert (found["epoch"], found["step"]) == (0, step)
    assert "loss" in found["parts"]
    return found["indices"]


def test_a_learning_rate_that_explodes_stops_the_run(tree, bad, teacher, tmp_path):
    output = tmp_path / "out"
    done = in_this_process("train_distill.py", *random_flags(bad / "flat", teacher, output), "--lr", "1e30")
    indices = assert_stopped(done, output, 1)
    assert len(set(indices)) == 6
    assert set(indices) < set(range(12))
    assert not (output / "student.pth").exists()


def test_a_teacher_with_infinite_weights_is_refused(bad, teacher, tmp_path):
    saved = load(teacher)
    saved["state_dict"]["module.encoder_q.conv5.1.bias"].fill_(float("inf"))
    torch.save(saved, tmp_path / "inf.pth")
    words = ["encoder_q.conv5.1.bias holds 1,024 NaN or infinite numbers"]
    flags = random_flags(bad / "flat", tmp_path / "inf.pth", tmp_path / "out")
    assert_refused(in_this_process("train_distill.py", *flags), words)
    assert_refused(in_this_process("compute_knn.py", "mine", "--data", bad / "flat", "--weights", tmp_path / "inf.pth",
                                   "--output", tmp_path / "nn", "--k", 3, "--workers", 0, "--device", "cpu"), words)
    assert not (tmp_path / "nn").exists()
