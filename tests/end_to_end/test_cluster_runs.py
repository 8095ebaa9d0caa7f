"""compute_knn.py cluster and check, and training over clusters: the real scripts on a tiny rendered tree."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
import torchvision
from helpers.runs import load, metrics
from helpers.scripts import assert_refused, in_this_process, script, well
from PIL import Image

TEACHER, STUDENT = "squeezenet_small", "squeezenet_small"
ON_CPU = ["--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """40 images of 32 pixels in 4 classes, told apart by colour."""
    root, rng = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    colours = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (210, 50, 40), "grey": (128, 128, 128)}
    for name, colour in colours.items():
        (root / name).mkdir()
        for i in range(10):
            pixels = rng.normal(colour, 12, (32, 32, 3)) + rng.normal(0, 10, 3)
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def teacher(work):
    torch.manual_seed(0)
    torch.save({"arch": TEACHER, "image_size": 32, "state_dict": torchvision.models.get_model(TEACHER).state_dict()},
               work / "teacher.pth")
    return work / "teacher.pth"


@pytest.fixture(scope="session")
def neighbours(tree, work, teacher):
    well(in_this_process("compute_knn.py", "mine", "--data", tree, "--weights", teacher, "--output", work / "nn", "--k",
                         12, "--far", "--image-size", 32, *ON_CPU))
    return work / "nn" / "closek_info.npy"


@pytest.fixture(scope="session")
def clusters(tree, work, teacher):
    done = well(script("compute_knn.py", "cluster", "--data", tree, "--weights", teacher, "--output", work / "nn",
                       "--num-clusters", 5, "--image-size", 32, *ON_CPU))
    assert "40 images in 5 clusters" in done.out
    return work / "nn" / "clusters_5.pth"


@pytest.fixture(scope="session")
def distil_flags(tree, teacher, neighbours, clusters):
    return ["--data", tree, "-a", STUDENT, "--distill", teacher, "--sampler", "cluster+cf", "--closek-info", neighbours,
            "--cluster-info", clusters, "--nearest-k", 3, "--total-k", 6, "-b", 4, "--epochs", 2, "-p", 100, "--lr",
            0.01, "--image-size", 32, *ON_CPU]


def labels_in(path):
    labels = np.full(40, -1)
    for cluster, images in load(path)["batches"].items():
        labels[images] = cluster
    return labels


def test_the_cluster_file(clusters, teacher):
    labels = labels_in(clusters)
    assert set(labels) == set(range(5))
    twin = json.loads(clusters.with_suffix(".json").read_text())
    assert twin["teacher_sha256"] == hashlib.sha256(teacher.read_bytes()).hexdigest()
    assert (twin["images"], twin["num_clusters"], twin["metric"], twin["init"]) == (40, 5, "euclidean", "k-means++")
    # At Lloyd's end each image is nearest to the mean of its own cluster, and the means say what the objective is.
    features = unit_features(teacher, clusters)
    means = torch.stack([features[labels == c].mean(dim=0) for c in range(5)])
    squared = torch.cdist(features, means).square()
    own = squared[torch.arange(40), torch.from_numpy(labels)]
    assert (own <= squared.min(dim=1).values + 1e-7).all()
    assert twin["objective"] == pytest.approx(float(own.mean()), rel=1e-3)


def unit_features(teacher, clusters):
    """Features of the tree in ImageFolder's order by torchvision alone, float64."""
    from torchvision import transforms as T

    model = torchvision.models.get_model(TEACHER)
    model.load_state_dict(load(teacher)["state_dict"])
    source = json.loads(clusters.with_suffix(".json").read_text())["source"]
    folder = torchvision.datasets.ImageFolder(source, T.Compose([
        T.Resize(33, interpolation=T.InterpolationMode.BICUBIC), T.CenterCrop(32), T.ToTensor(),
        T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]))
    with torch.no_grad():
        features = model.eval().features(torch.stack([image for image, _ in folder])).mean(dim=(2, 3)).double()
    return torch.nn.functional.normalize(features, dim=1)


def test_two_processes_cluster_as_one_does(tree, teacher, clusters, tmp_path):
    well(script("compute_knn.py", "cluster", "--data", tree, "--weights", teacher, "--output", tmp_path,
                "--num-clusters", 5, "--image-size", 32, *ON_CPU, processes=2))
    assert (labels_in(tmp_path / "clusters_5.pth") == labels_in(clusters)).all()


def test_check_says_that_it_belongs_and_draws_it(tree, neighbours, clusters, tmp_path):
    done = well(script("compute_knn.py", "check", neighbours, "--data", tree, "--anchors", 3, "--show", 4, "--sheet",
                       tmp_path / "sheet.png", "--device", "cpu"))
    assert f"{neighbours} belongs to {tree}: 40 images" in done.out
    assert "have the class of their image" in done.out
    assert done.err == ""
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > 9 * 96  # the anchor, its four nearest and, from fark_info.npy beside it, its four farthest
        assert image.height > 3 * 96
    done = well(in_this_process("compute_knn.py", "check", clusters, "--data", tree, "--device", "cpu"))
    assert "Each image is in one of 5 clusters" in done.out
    assert clusters.with_suffix(".png").is_file()
    done = well(in_this_process("compute_knn.py", "check", clusters, "--data", tree, "--sheet", "none", "--device",
                                "cpu"))
    assert "Picture" not in done.out


def test_check_refuses(tree, neighbours, clusters, tmp_path):
    (tmp_path / "few").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "few" / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "few" / "b.png")
    ids = np.load(neighbours)
    ids[4, 0] = 4
    np.save(tmp_path / "own.npy", ids)
    for file, data, words in (
            (neighbours, tmp_path / "few", ["holds neighbours of 40 images and --data has 2"]),
            (clusters, tmp_path / "few", ["was made from other images"]),
            (tmp_path / "own.npy", tree, ["1 images are their own neighbour (image 4 first)"]),
            (tmp_path / "nowhere.npy", tree, ["nowhere.npy does not exist"]),
            (clusters, tmp_path / "nowhere", ["--data", "nowhere"])):
        done = in_this_process("compute_knn.py", "check", file, "--data", data, "--sheet", tmp_path / "x" / "s.png",
                               "--device", "cpu")
        assert_refused(done, words)
        assert not (tmp_path / "x").exists()


def test_cluster_refuses(tree, teacher, tmp_path):
    done = in_this_process("compute_knn.py", "cluster", "--data", tree, "--weights", teacher, "--output",
                           tmp_path / "out", "--num-clusters", 41, *ON_CPU)
    assert_refused(done, ["--num-clusters 41", "40 images"])
    assert not (tmp_path / "out").exists()


def test_a_finished_file_of_something_else_stays(tree, work, teacher, neighbours, clusters, tmp_path):
    """Of another network, of other images or made in another way; and one that nothing says anything about."""
    torch.manual_seed(1)
    torch.save({"arch": TEACHER, "image_size": 32, "state_dict": torchvision.models.get_model(TEACHER).state_dict()},
               tmp_path / "other.pth")
    shutil.copytree(work / "nn", tmp_path / "nn", ignore=lambda *_: ["features"])
    kept = {path.name: path.read_bytes() for path in (tmp_path / "nn").iterdir() if path.suffix in (".npy", ".pth")}
    assert len(kept) == 3
    flags = ["--data", tree, "--weights", teacher, "--output", tmp_path / "nn", *ON_CPU, "--features",
             tmp_path / "features"]
    mine, cluster = ["mine", "--k", 5], ["cluster", "--num-clusters", 5]
    for command, more, words in (
            (mine, ["--weights", tmp_path / "other.pth"], "closek_info.npy is there and was made otherwise (teacher"),
            (mine, ["--data", tree / "red"], "made otherwise (fingerprint was"),
            (mine, ["--metric", "l2"], "made otherwise (metric was 'cosine', now 'l2')"),
            (cluster, ["--weights", tmp_path / "other.pth"], "clusters_5.pth is there and was made otherwise (teach"),
            (cluster, ["--seed", 3], "made otherwise (seed was 0, now 3); choose another folder, or remove it")):
        assert_refused(in_this_process("compute_knn.py", *command, *flags, *more), words)
    well(in_this_process("compute_knn.py", *mine, *flags))  # the same with fewer neighbours
    assert np.array_equal(np.load(tmp_path / "nn" / "closek_info.npy"), np.load(neighbours)[:, :5])
    (tmp_path / "nn" / "closek_info.npy").write_bytes(kept["closek_info.npy"])
    (tmp_path / "nn" / "closek_info.json").unlink()
    assert_refused(in_this_process("compute_knn.py", *mine, *flags), "has no readable closek_info.json beside it")
    assert {name: (tmp_path / "nn" / name).read_bytes() for name in kept} == kept


# ---- training


@pytest.fixture(scope="session")
def run(work, distil_flags):
    well(script("train_distill.py", *distil_flags, "--output", work / "run"))
    return work / "run"


def test_training_over_clusters_logs_what_each_epoch_has_shown(run):
    lines = metrics(run, "sampler")
    assert [line["epoch"] for line in lines] == [1, 2]
    steps = np.diff([0] + [line["step"] for line in lines])
    for line, count in zip(lines, steps, strict=True):
        assert line["images"] == count * 4 * 4
        assert 38 <= line["unique"] <= 40  # 95 % of 40
        assert line["share_seen"] == line["unique"] / 40
        assert line["repeats"] == line["images"] - line["unique"]
    assert "different ones" in (run / "log.txt").read_text()
    assert (run / "student.pth").is_file()


def test_an_interrupted_run_goes_on_to_the_same_student(run, distil_flags, tmp_path, monkeypatch):
    from runtime.run import Run

    save = Run.save

    def stop_after_the_first_epoch(self, epoch, *rest):
        save(self, epoch, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", stop_after_the_first_epoch)
        assert in_this_process("train_distill.py", *distil_flags, "--output", tmp_path / "cut").rc == 130
    well(in_this_process("train_distill.py", *distil_flags, "--output", tmp_path / "cut"))
    one, two = load(run / "student.pth")["state_dict"], load(tmp_path / "cut" / "student.pth")["state_dict"]
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert metrics(run, "sampler") == metrics(tmp_path / "cut", "sampler")


@pytest.mark.parametrize(("sampler", "processes"), [("cluster+cf", 2), ("cluster", 2), ("cf", 0), ("random", 0)])
def test_the_other_samplers_and_two_processes(distil_flags, neighbours, clusters, tmp_path, sampler, processes):
    """With the farthest images where neighbours are used; one epoch."""
    launch = script if processes else lambda name, *flags, processes: in_this_process(name, *flags)
    flags = [*distil_flags, "--sampler", sampler, "--epochs", 1, "--output", tmp_path / "out", "--fark-info",
             neighbours.with_name("fark_info.npy")]
    done = well(launch("train_distill.py", *flags, processes=processes))
    (line,) = metrics(tmp_path / "out", "sampler")
    with_neighbours = "cf" in sampler
    assert line["images"] == line["step"] * 4 * (4 if with_neighbours else 1)
    assert line["unique"] >= 38
    assert ("--fark-info has no effect" in done.out) is not with_neighbours
    assert ("--cluster-info has no effect" in done.out) is ("cluster" not in sampler)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["far_k"] == (1 if with_neighbours else 0)
    assert config["num_clusters"] == (5 if "cluster" in sampler else 0)
    read = [np.load(neighbours.with_name(f"{name}.npy"))[:, :6].astype("<i8") for name in ("closek_info", "fark_info")]
    of_images = np.full(40, -1, "<i4")
    for cluster, images in torch.load(clusters, weights_only=True)["batches"].items():
        of_images[images] = cluster
    expected = dict(zip(("closek_info", "fark_info"), read, strict=True)) if with_neighbours else {}
    expected |= {"cluster_info": of_images} if "cluster" in sampler else {}
    assert {key: value for key, value in config.items() if key.endswith("_info_fingerprint")} == {
        f"{name}_fingerprint": hashlib.sha256(numbers.tobytes()).hexdigest() for name, numbers in expected.items()}


def test_other_clusters_are_another_run(run, distil_flags, tree, teacher, tmp_path):
    well(in_this_process("compute_knn.py", "cluster", "--data", tree, "--weights", teacher, "--output", tmp_path,
                         "--num-clusters", 4, "--image-size", 32, *ON_CPU))
    done = in_this_process("train_distill.py", *distil_flags, "--cluster-info", tmp_path / "clusters_4.pth", "--output",
                           run)
    assert_refused(done, ["num_clusters was 5, now 4", "cluster_info_fingerprint was '"])


def test_other_neighbours_are_another_run(run, distil_flags, neighbours, tmp_path):
    np.save(tmp_path / "other.npy", np.load(neighbours)[:, ::-1])
    done = in_this_process("train_distill.py", *distil_flags, "--closek-info", tmp_path / "other.npy", "--output", run)
    assert_refused(done, ["holds a different run (closek_info_fingerprint was '"])


@pytest.mark.parametrize(("changed", "words"), [
    (["--cluster-info", ""], ["--sampler cluster+cf needs --cluster-info", "compute_knn.py cluster"]),
    (["--closek-info", ""], ["--sampler cluster+cf needs --closek-info", "compute_knn.py mine"]),
    (["--cluster-info", "{teacher}"], ["--cluster-info", "teacher.pth", "'batches'"]),
    (["--fark-info", "{teacher}"], ["--fark-info", "teacher.pth"]),
    (["--closek-info", "{composed}", "--cluster-info", ""], ["--closek-info", "create_offline_batches.py", "give"]),
    (["--subset", "0.5"], ["--closek-info", "40 images", "has 20"]),
    (["--sampler", "cluster", "--subset", "0.5"], ["--cluster-info", "other images"]),
    (["--sampler", "cluster", "-b", "41"], ["--batch-size 41", "40 images"]),
])
def test_training_refuses(changed, words, distil_flags, teacher, tmp_path):
    composed = tmp_path / "composed.npy"  # as the original saves it
    np.save(composed, {epoch: {rank: [1, 2, 3] for rank in range(2)} for epoch in range(2)})
    done = in_this_process("train_distill.py", *distil_flags, "--output", tmp_path / "out",
                           *[word.format(teacher=teacher, composed=composed) for word in changed])
    assert_refused(done, words)
    assert not (tmp_path / "out").exists()
