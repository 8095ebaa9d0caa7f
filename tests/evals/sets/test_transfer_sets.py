"""Each data set's layout, written small, read by us and by torchvision."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as sets
from PIL import Image

from evals.sets.transfer_layouts import LAYOUTS
from evals.sets.transfer_sets import open_transfer_folder, open_transfer_set
from runtime.errors import UserError


def image(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(path)


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row + "\n" for row in rows))


def found(source):
    """(file, label) of each image, in order."""
    labels = [None] * len(source) if source.labels is None else source.labels.tolist()
    return [(source.location(i), label) for i, label in enumerate(labels)]


def of_torchvision(dataset):
    files = getattr(dataset, "_image_files", None) or getattr(dataset, "_images", None)
    if files is None:
        return [(str(file), int(label)) for file, label in dataset._samples]
    return [(str(file), int(label)) for file, label in zip(files, dataset._labels, strict=True)]


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10's pickles with five images each, and their checksums in place of the real ones."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [name for name, _ in sets.CIFAR10.train_list + sets.CIFAR10.test_list]
    for name in names:
        entry = {"data": rng.integers(0, 256, (5, 3072), dtype=np.uint8), "labels": rng.integers(0, 10, 5).tolist()}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(sets.CIFAR10, "train_list", [[name, md5(folder / name)] for name in names[:5]])
    monkeypatch.setattr(sets.CIFAR10, "test_list", [[name, md5(folder / name)] for name in names[5:]])
    monkeypatch.setattr(sets.CIFAR10, "meta", {**sets.CIFAR10.meta, "md5": md5(folder / "batches.meta")})
    return tmp_path


@pytest.mark.parametrize("below", ["", "cifar10"])
def test_cifar(cifar, below):
    if below:  # where data/datasets.py puts it
        (cifar / below).mkdir()
        (cifar / "cifar-10-batches-py").rename(cifar / below / "cifar-10-batches-py")
    each = open_transfer_set("cifar10", cifar)
    for source, train in ((each.train, True), (each.test, False)):
        other = sets.CIFAR10(str(cifar / below), train=train)
        assert (source.images == other.data).all()
        assert source.labels.tolist() == other.targets
    assert each.validation is None
    assert each.classes == list("abcdefghij")
    assert each.metric == "top1"
    assert each.description == "cifar10: 10 classes; 25 train, 5 test images"


def test_a_damaged_cifar(cifar):
    (cifar / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"")
    with pytest.raises(UserError, match=r"--datasets cifar10 is incomplete \(Dataset not found or corrupted.*cifar-10"):
        open_transfer_set("cifar10", cifar)


def test_stl10(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 3)):
        rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{part}_X.bin")
        (np.arange(count, dtype=np.uint8) + 1).tofile(folder / f"{part}_y.bin")
    (folder / "unlabeled_X.bin").write_bytes(b"")
    lines(folder / "class_names.txt", *"abcdefghij")
    for kind in ("train_list", "test_list"):
        monkeypatch.setattr(sets.STL10, kind, [[name, md5(folder / name)] for name, _ in getattr(sets.STL10, kind)])
    each = open_transfer_set("stl10", tmp_path)
    other = sets.STL10(str(tmp_path), split="test")
    assert (each.train.labels.tolist(), each.test.labels.tolist()) == ([0, 1, 2, 3], [0, 1, 2])
    assert (np.asarray(each.test.open(1)) == np.asarray(other[1][0])).all()
    assert each.classes == list("abcdefghij")


def caltech(root, counts):
    for name, count in counts.items():
        for i in range(count):
            image(root / "caltech101" / "101_ObjectCategories" / name / f"image_{i + 1:04d}.jpg")


def test_caltech101(tmp_path):
    counts = {"BACKGROUND_Google": 33, "ant": 31, "Zebra": 40}
    caltech(tmp_path, counts)
    each = open_transfer_set("caltech101", tmp_path)
    assert each.classes == sorted(counts)
    assert np.bincount(each.train.labels).tolist() == [30, 30, 30]
    assert np.bincount(each.test.labels).tolist() == [3, 10, 1]
    rows = found(each.train) + found(each.test)
    assert len({file for file, _ in rows}) == 104
    assert all(f"/{each.classes[label]}/" in file for file, label in rows)
    again, other = open_transfer_set("caltech101", tmp_path), open_transfer_set("caltech101", tmp_path, seed=1)
    assert found(again.train) == found(each.train) != found(other.train)
    assert each.metric == "per_class"


def test_a_caltech_class_that_leaves_nothing_to_test(tmp_path):
    caltech(tmp_path, {"ant": 31, "bee": 30})
    with pytest.raises(UserError, match=r"caltech101 is incomplete \(class bee has no more than 30 images\)"):
        open_transfer_set("caltech101", tmp_path)


def test_cars(tmp_path):
    from scipy.io import savemat

    folder = tmp_path / "stanford_cars"
    record = [("fname", object), ("class", object)]
    for part, rows in (("train", [("1.jpg", 2), ("2.jpg", 1), ("3.jpg", 2)]), ("test", [("1.jpg", 1), ("2.jpg", 2)])):
        for name, _ in rows:
            image(folder / f"cars_{part}" / name)
        place = folder / "devkit" / "cars_train_annos.mat" if part == "train" else (
            folder / "cars_test_annos_withlabels.mat")
        place.parent.mkdir(exist_ok=True)
        savemat(place, {"annotations": np.array(rows, dtype=record)})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(["A 2012", "B 2009"], dtype=object)})
    each = open_transfer_set("cars", tmp_path)
    assert found(each.train) == of_torchvision(sets.StanfordCars(str(tmp_path), "train"))
    assert found(each.test) == of_torchvision(sets.StanfordCars(str(tmp_path), "test"))
    assert (each.train.labels.tolist(), each.test.labels.tolist()) == ([1, 0, 1], [0, 1])
    assert each.classes == ["A 2012", "B 2009"]


def test_dtd(tmp_path):
    folder = tmp_path / "dtd" / "dtd"
    names = {part: [f"{c}/{c}_{part}.jpg" for c in ("dotted", "banded")] for part in ("train", "val", "test")}
    for part, files in names.items():
        lines(folder / "labels" / f"{part}1.txt", *files)
        for name in files:
            image(folder / "images" / name)
    each = open_transfer_set("dtd", tmp_path)
    for source, split in ((each.train, "train"), (each.validation, "val"), (each.test, "test")):
        assert found(source) == of_torchvision(sets.DTD(str(tmp_path), split, partition=1))
        assert source.labels.tolist() == [1, 0]
    assert each.classes == ["banded", "dotted"]


@pytest.mark.parametrize("named", [True, False])  # torchvision 0.21 has no names of its classes
def test_flowers102(named, tmp_path, monkeypatch):
    from scipy.io import savemat

    if not named:
        monkeypatch.delattr(sets.Flowers102, "classes", raising=False)
    folder = tmp_path / "flowers-102"
    for i in range(1, 8):
        image(folder / "jpg" / f"image_{i:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([[102, 1, 2, 102, 1, 2, 1]])})
    savemat(folder / "setid.mat", {"trnid": [[3, 1, 2]], "valid": [[4, 7]], "tstid": [[6, 5]]})
    files = {name: (file, md5(folder / file) if name != "image" else digest)
             for name, (file, digest) in sets.Flowers102._file_dict.items()}
    monkeypatch.setattr(sets.Flowers102, "_file_dict", files)
    each = open_transfer_set("flowers102", tmp_path)
    for source, split in ((each.train, "train"), (each.validation, "val"), (each.test, "test")):
        assert found(source) == of_torchvision(sets.Flowers102(str(tmp_path), split))
    assert each.train.labels.tolist() == [1, 101, 0]
    assert (len(each.classes), each.metric) == (102, "per_class")
    assert each.classes == list(getattr(sets.Flowers102, "classes", map(str, range(102))))


def test_pets(tmp_path):
    folder = tmp_path / "oxford-iiit-pet"
    rows = {"trainval": ["Abyssinian_1 1 1 1", "great_pyrenees_7 2 2 1"], "test": ["great_pyrenees_2 2 2 1"]}
    for part, texts in rows.items():
        lines(folder / "annotations" / f"{part}.txt", *texts)
        for text in texts:
            image(folder / "images" / f"{text.split()[0]}.jpg")
    each = open_transfer_set("pets", tmp_path)
    assert found(each.train) == of_torchvision(sets.OxfordIIITPet(str(tmp_path), "trainval"))
    assert found(each.test) == of_torchvision(sets.OxfordIIITPet(str(tmp_path), "test"))
    assert each.classes == ["Abyssinian", "Great Pyrenees"]
    assert each.validation is None


def test_aircraft(tmp_path):
    folder = tmp_path / "fgvc-aircraft-2013b" / "data"
    lines(folder / "variants.txt", "707-320", "727-200", "F/A-18")
    for number, part in enumerate(("train", "val", "test")):
        lines(folder / f"images_variant_{part}.txt", f"100{number} F/A-18", f"200{number} 707-320")
        for first in (1, 2):
            image(folder / "images" / f"{first}00{number}.jpg")
    each = open_transfer_set("aircraft", tmp_path)
    for source, split in ((each.train, "train"), (each.validation, "val"), (each.test, "test")):
        assert found(source) == of_torchvision(sets.FGVCAircraft(str(tmp_path), split))
        assert source.labels.tolist() == [2, 0]
    assert each.metric == "per_class"


def test_food101(tmp_path):
    folder = tmp_path / "food-101"
    for part, numbers in (("train", (1, 2)), ("test", (3,))):
        lines(folder / "meta" / f"{part}.json", str({c: [f"{c}/{n}" for n in numbers] for c in ("pie", "bread")}
                                                    ).replace("'", '"'))
        for name in (f"{c}/{n}.jpg" for c in ("pie", "bread") for n in numbers):
            image(folder / "images" / name)
    each = open_transfer_set("food101", tmp_path)
    assert found(each.train) == of_torchvision(sets.Food101(str(tmp_path), "train"))
    assert found(each.test) == of_torchvision(sets.Food101(str(tmp_path), "test"))
    assert each.train.labels.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("place", [".", "Partitions"])
def test_sun397(tmp_path, place):
    folder = tmp_path / "SUN397"
    lines(folder / "ClassName.txt", "/a/abbey", "/c/church/indoor", "/c/church/outdoor")
    train = ["/c/church/outdoor/sun_b.jpg", "/a/abbey/sun_a.jpg"]
    test = ["/c/church/indoor/sun_c.jpg"]
    for name in train + test:
        image(folder / name[1:])
    with pytest.raises(UserError, match=r"sun397: the official split Training_01.txt .*Partitions.zip"):
        open_transfer_set("sun397", tmp_path)
    lines(folder / place / "Training_01.txt", *train)
    lines(folder / place / "Testing_01.txt", *test)
    each = open_transfer_set("sun397", tmp_path)
    assert found(each.train) == [(str(folder / train[0][1:]), 2), (str(folder / train[1][1:]), 0)]
    assert found(each.test) == [(str(folder / test[0][1:]), 1)]
    everything = dict(of_torchvision(sets.SUN397(str(tmp_path))))
    assert all(everything[file] == label for file, label in found(each.train) + found(each.test))


@pytest.fixture
def voc(tmp_path):
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    marks = {"train": {"000005": (1, -1), "000007": (-1, 0)}, "val": {"000009": (-1, 1), "000012": (1, -1)},
             "test": {"000001": (0, 1), "000002": (1, 1), "000003": (-1, -1)}}
    for part, images in marks.items():
        lines(folder / "ImageSets" / "Main" / f"{part}.txt", *images)
        for number, name in enumerate(("aeroplane", "dog")):
            lines(folder / "ImageSets" / "Main" / f"{name}_{part}.txt",
                  *(f"{i} {mark[number]:2d}" for i, mark in images.items()))
        for i in images:
            image(folder / "JPEGImages" / f"{i}.jpg")
    return tmp_path


def test_voc2007(voc):
    each = open_transfer_set("voc2007", voc)
    assert (each.classes, each.metric) == (["aeroplane", "dog"], "map11")
    assert each.labels("train").tolist() == [[1, -1], [-1, 0]]
    assert each.labels("validation").tolist() == [[-1, 1], [1, -1]]
    assert each.labels("test").tolist() == [[0, 1], [1, 1], [-1, -1]]
    for source, part in ((each.train, "train"), (each.validation, "val"), (each.test, "test")):
        assert source.labels is None
        assert [file for file, _ in found(source)] == sets.VOCDetection(str(voc), "2007", part).images
    half = each.subset(0.5)
    assert half.labels("train").tolist() == [[1, -1]]
    assert half.labels("validation").tolist() == [[-1, 1]]
    assert len(half.labels("test")) == 3


def test_voc2007_without_its_test_images(voc):
    (voc / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "dog_test.txt").unlink()
    with pytest.raises(UserError, match=r"voc2007 is incomplete .*dog_test.txt.*host.robots.ox.ac.uk"):
        open_transfer_set("voc2007", voc)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_set_that_is_not_there_is_one_sentence(name, tmp_path):
    with pytest.raises(UserError) as error:
        open_transfer_set(name, tmp_path)
    text = str(error.value)
    assert text.startswith(f"--datasets {name} was not found (")
    assert str(tmp_path / LAYOUTS[name].folder) in text
    assert "https://" in text
    assert "terms" in text
    assert ("--download" in text) == (name != "cars")
    assert not list(tmp_path.iterdir())


def test_a_download_that_fails_is_one_sentence(tmp_path, monkeypatch):
    def fail(self):
        self._base_folder.mkdir()
        raise OSError("<urlopen error>\nno network")

    monkeypatch.setattr(sets.DTD, "_download", fail)
    with pytest.raises(UserError, match=r"dtd could not be fetched \(<urlopen error> no network\).*check the network"):
        open_transfer_set("dtd", tmp_path, download=True)
    assert not list(tmp_path.iterdir())


def folders(root, *parts, classes=("a", "b"), each=2):
    for part in parts:
        for c in classes:
            for i in range(each):
                image(root / part / c / f"{part}{i}.png")


def test_a_folder_by_name_comes_first_and_others_are_named(tmp_path):
    folders(tmp_path / "pets", "train", "test")
    each = open_transfer_set("pets", tmp_path)
    assert (each.name, each.metric, len(each.train), len(each.test)) == ("pets", "per_class", 4, 4)
    folders(tmp_path / "mine", "train", "val")
    assert open_transfer_set("mine", tmp_path).metric == "top1"
    with pytest.raises(UserError, match="nothing is neither .* nor one of cifar10, cifar100"):
        open_transfer_set("nothing", tmp_path)


def test_val_validates_where_there_is_a_test_folder_too(tmp_path):
    folders(tmp_path, "train", "val", "test")
    (tmp_path / "test" / "a" / "test0.png").unlink()
    each = open_transfer_folder(str(tmp_path))
    assert [source.names[0] for source in (each.train, each.validation, each.test)] == [
        "a/train0.png", "a/val0.png", "a/test1.png"]
    assert each.test.labels.tolist() == [0, 1, 1]
    folders(tmp_path, "test", classes=("c",))
    with pytest.raises(UserError, match=r"1 classes that are not among the 2 training classes \(c…\)"):
        open_transfer_folder(str(tmp_path))


def test_labels_of_a_test_folder_that_lacks_a_class(tmp_path):
    folders(tmp_path, "train", "val", "test", classes=("a", "b", "c"))
    for file in (tmp_path / "test" / "a").iterdir():
        file.unlink()
    (tmp_path / "test" / "a").rmdir()
    each = open_transfer_folder(str(tmp_path))
    assert each.test.labels.tolist() == [1, 1, 2, 2]
    assert each.test.classes == ["a", "b", "c"]


def test_the_table_in_the_docs():
    table = (Path(__file__).parents[3] / "docs" / "EVALUATION.md").read_text()
    names = {"top1": "top-1", "per_class": "mean per class", "map11": "11-point mAP"}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    assert {row[0]: (row[1], row[3], row[4]) for row in rows if row[0] in LAYOUTS} == {
        name: (layout.folder, names[layout.metric], layout.page) for name, layout in LAYOUTS.items()}
