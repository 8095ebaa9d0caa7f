"""Maps against scikit-learn and a brute search of rotations; the picture and the page."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import open_source
from evals.plane import plane, spread_out, turned
from evals.plane_picture import save_html, save_png
from runtime.errors import UserError


def features(n=40, d=7, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + torch.linspace(0, 3, d)


def test_pca_is_scikit_learns_of_rows_of_length_one():
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = features()
    points, explained = plane(x)
    oracle = decomposition.PCA(2, svd_solver="full")
    expected = oracle.fit_transform((x.double() / x.double().norm(dim=1, keepdim=True)).numpy())
    expected /= np.sqrt((expected**2).sum(1).mean())
    for column, wanted in zip(points.T, expected.T, strict=True):
        assert np.allclose(column, wanted, atol=1e-9) or np.allclose(column, -wanted, atol=1e-9)
    assert explained == pytest.approx(oracle.explained_variance_ratio_.sum(), abs=1e-9)
    assert np.array_equal(plane(x)[0], points)
    assert plane(torch.ones(5, 1))[0].shape == (5, 2)  # nothing differs


def test_tsne_is_seeded_and_has_the_same_scale():
    pytest.importorskip("sklearn.manifold")
    points, explained = plane(features(12), "tsne", seed=3)
    assert (points.shape, explained) == ((12, 2), None)
    assert (points**2).sum(1).mean() == pytest.approx(1)
    assert np.array_equal(plane(features(12), "tsne", seed=3)[0], points)


def test_a_missing_library_and_too_few_images(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(UserError, match="--method umap needs the package umap-learn, .* `pip install umap-learn"):
        plane(features(), "umap")
    with pytest.raises(UserError, match="a map of 2 images"):
        plane(features(2))


def test_turning_is_the_best_of_all_rotations_and_reflections():
    onto, points = plane(features(seed=1))[0], plane(features(seed=2))[0]
    found, agreement = turned(points, onto)
    best = np.inf
    for angle in np.linspace(0, 2 * np.pi, 3601):
        cos, sin = np.cos(angle), np.sin(angle)
        for flip in (1, -1):
            best = min(best, (((points @ np.array([[cos, -sin], [flip * sin, flip * cos]])) - onto) ** 2).sum())
    assert ((found - onto) ** 2).sum() == pytest.approx(best, rel=1e-5)
    scale = (found * onto).sum() / (found**2).sum()
    assert agreement == pytest.approx(1 - ((scale * found - onto) ** 2).sum() / (onto**2).sum())
    mirrored = onto @ np.array([[0.6, 0.8], [0.8, -0.6]])
    assert np.allclose(turned(mirrored, onto)[0], onto)
    assert turned(mirrored, onto)[1] == pytest.approx(1)


def test_examples_lie_far_apart():
    line = np.array([[-1.0, 0], [-0.9, 0], [0.05, 0], [0.9, 0], [1, 0]])
    assert spread_out(line, 3) == [2, 0, 4]
    assert spread_out(np.zeros((4, 2)), 3) == [0]


@pytest.fixture
def photos(tmp_path):
    for i in range(6):
        path = tmp_path / "photos" / ("a", "<script>b")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20), (40 * i, 0, 0)).save(path)
    return open_source(str(tmp_path / "photos"), labelled=True)


def test_the_page_holds_everything_and_nothing_of_it_is_markup(photos, tmp_path):
    maps = {"teacher": plane(features(6))[0], "student": plane(features(6, seed=1))[0]}
    page = save_html(tmp_path / "map.html", maps, photos, "six <images>").read_text()
    assert page.count("<script>") == page.count("</script>") == 1
    assert not re.search(r"(src|href)=.?http", page)
    values = json.loads(re.search(r"const all = (\{.*?\}), side", page)[1])
    assert values["names"] == list(photos.names)
    assert values["classes"] == photos.classes
    assert [one["name"] for one in values["maps"]] == ["teacher", "student"]
    assert np.allclose(values["maps"][1]["points"], maps["student"], atol=1e-4)
    assert len(values["pictures"]) == 6


def test_the_picture_has_a_panel_for_each_network(photos, tmp_path):
    pytest.importorskip("matplotlib")
    points = plane(features(6))[0]
    widths = []
    for count in (1, 2):
        path = save_png(tmp_path / "map.png", {str(i): points for i in range(count)}, photos, "title")
        widths.append(Image.open(path).width)
    assert widths[1] == 2 * widths[0]
