"""A tiny revisited Oxford: what is cropped and shrunk, what the ground truth may be, and what is said of damage."""

import pickle

import numpy as np
import pytest
from PIL import Image

from data.images import BadImage
from evals.sets.landmarks import open_landmarks
from runtime.errors import UserError

DATABASE, QUERIES = [f"castle_{i:06d}" for i in range(5)], ["query_000001", "query_000002"]
TRUTH = [{"bbx": [10.0, 5.4, 50.6, 25], "easy": np.array([0, 3]), "hard": [1], "junk": []},
         {"bbx": (0, 0, 8, 8), "easy": [], "hard": np.array([2, 4], dtype=np.int32), "junk": np.array([0])}]


def write(root, name="roxford5k", truth=TRUTH, folder="jpg", **more):
    images = root / name / folder
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for image in [*DATABASE, *QUERIES]:
        pixels = generator.integers(0, 256, (30, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{image}.jpg", quality=95)
    content = {"imlist": DATABASE, "qimlist": QUERIES, "gnd": truth, **more}
    (root / name / f"gnd_{name}.pkl").write_bytes(pickle.dumps(content))
    return root


def test_queries_are_cropped_and_shrunk_as_the_whole_is(tmp_path):
    whole = open_landmarks(write(tmp_path), "roxford5k", 1024)
    assert (list(whole.database.names), list(whole.queries.names)) == (
        [f"{x}.jpg" for x in DATABASE], [f"{x}.jpg" for x in QUERIES])
    assert {k: v.tolist() for k, v in whole.truth[0].items()} == {"easy": [0, 3], "hard": [1], "junk": []}
    image = Image.open(tmp_path / "roxford5k" / "jpg" / f"{QUERIES[0]}.jpg").convert("RGB")
    assert np.array_equal(whole.queries.open(0), image.crop((10, 5, 51, 25)))   # Pillow rounds the corners
    assert whole.database.open(0).size == (60, 30)                              # never enlarged
    small = open_landmarks(tmp_path, "roxford5k", 30)
    assert small.database.open(1).size == (30, 15)
    assert small.queries.open(0).size == (20, 10)                               # 41 x 20, halved
    assert small.queries.pixels(0).shape == (3, 10, 20)


def test_the_fingerprint_knows_size_and_boxes(tmp_path):
    root = write(tmp_path)
    moved = [{**TRUTH[0], "bbx": [11.0, 5, 50, 25]}, TRUTH[1]]
    other = write(tmp_path / "other", truth=moved)
    prints = [[x.fingerprint() for x in open_landmarks(*where)[:2]] for where in (
        (root, "roxford5k", 64), (root, "roxford5k", 64), (root, "roxford5k", 32), (other, "roxford5k", 64))]
    assert prints[0] == prints[1]
    assert prints[0][0] != prints[2][0] != prints[3][0]
    assert prints[0][1] == prints[3][1] != prints[2][1]
    taken = open_landmarks(root, "roxford5k", 64).queries.take(np.array([1]))
    assert taken.open(0).size == (8, 8)


def test_no_rotation_and_what_is_left_of_a_truncated_file(tmp_path):
    path = write(tmp_path, "rparis6k", folder="jpg/castle") / "rparis6k" / "jpg" / "castle" / f"{DATABASE[0]}.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6                                          # turned by 90 degrees
    Image.fromarray(np.zeros((30, 60, 3), np.uint8)).save(path, exif=exif)
    assert open_landmarks(tmp_path, "rparis6k", 60).database.open(0).size == (60, 30)
    content = path.read_bytes()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    assert open_landmarks(tmp_path, "rparis6k", 500).database.open(0).size == (400, 400)
    with pytest.raises(OSError, match="truncated"):           # only there
        Image.open(path).load()
    path.write_bytes(content[:10])
    with pytest.raises(BadImage):
        open_landmarks(tmp_path, "rparis6k", 60).database.open(0)


class Touches:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return __import__("os").mkdir, (self.path,)


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(UserError, match=r"--root .*no roxford5k: .*oxbuildings.*revisitop"):
        open_landmarks(tmp_path, "roxford5k", 64)
    root = write(tmp_path)
    path = root / "roxford5k" / "gnd_roxford5k.pkl"
    content = pickle.loads(path.read_bytes())
    for wrong in ({"imlist": []}, {**content, "gnd": [{**TRUTH[0], "easy": [5]}, TRUTH[1]]},
                  {**content, "gnd": TRUTH[:1]}, {**content, "imlist": ["../x", *DATABASE[1:]]},
                  {**content, "gnd": [{**TRUTH[0], "bbx": [1, 2, 3]}, TRUTH[1]]}, [1]):
        path.write_bytes(pickle.dumps(wrong))
        with pytest.raises(UserError, match="not the ground truth of the revisited"):
            open_landmarks(root, "roxford5k", 64)
    path.write_bytes(pickle.dumps({**content, "more": Touches(str(tmp_path / "made"))}))
    with pytest.raises(UserError, match="not a plain pickle .*mkdir"):
        open_landmarks(root, "roxford5k", 64)
    assert not (tmp_path / "made").exists()
    path.write_bytes(b"<html>")
    with pytest.raises(UserError, match="not a plain pickle"):
        open_landmarks(root, "roxford5k", 64)
    path.write_bytes(pickle.dumps(content))
    (root / "roxford5k" / "jpg" / f"{DATABASE[2]}.jpg").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 7 images, castle_000002.jpg"):
        open_landmarks(root, "roxford5k", 64)
