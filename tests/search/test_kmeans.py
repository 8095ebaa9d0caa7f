"""k-means against scikit-learn and a naive loop, from the same start; one process against two."""


import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.ranks import on_ranks

from runtime.device import Process
from search import kmeans as module
from search.kmeans import kmeans

ALONE = Process(0, 1, torch.device("cpu"))


def blobs(count=600, width=8, centres=7, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    middle = 3 * torch.randn(centres, width, generator=generator)
    return middle[torch.arange(count) % centres] + spread * torch.randn(count, width, generator=generator)


def same_partition(a, b):
    """Whether two labellings group alike, whatever the numbers."""
    pairs = set(zip(np.asarray(a).tolist(), np.asarray(b).tolist(), strict=True))
    return len(pairs) == len({x for x, _ in pairs}) == len({y for _, y in pairs})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [2, 7, 20])
def test_euclidean_from_the_same_start_as_scikit_learn(seed, count):
    cluster = pytest.importorskip("sklearn.cluster")
    rows = blobs(spread=3.0, seed=seed)
    start = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]
    found = kmeans(rows, count, ALONE, init=start, tolerance=0)
    expected = cluster.KMeans(count, init=start.double().numpy(), n_init=1, tol=0, max_iter=1000).fit(
        rows.double().numpy())
    assert found.converged
    assert (found.labels.numpy() == expected.labels_).all()
    np.testing.assert_allclose(found.centres.numpy(), expected.cluster_centers_, rtol=1e-4, atol=1e-5)
    assert found.objective == pytest.approx(expected.inertia_ / len(rows), rel=1e-5)
    assert found.sizes.tolist() == np.bincount(expected.labels_, minlength=count).tolist()


def naive_spherical(rows, centres, passes):
    """Written from the definition, float64."""
    rows, centres = F.normalize(rows.double(), dim=1), F.normalize(centres.double(), dim=1)
    for _ in range(passes):
        labels = torch.tensor([max(range(len(centres)), key=lambda c, r=row: float(r @ centres[c])) for row in rows])
        centres = torch.stack([F.normalize(rows[labels == c].sum(dim=0), dim=0) for c in range(len(centres))])
    return labels, centres, float(1 - (rows * centres[labels]).sum(dim=1).mean())


@pytest.mark.parametrize("seed", range(3))
def test_spherical_against_the_naive_loop(seed):
    rows = blobs(150, 5, 4, 2.5, seed) * torch.rand(150, 1).add(0.1)  # lengths must not matter
    found = kmeans(rows, 4, ALONE, metric="cosine", init=rows[:4], tolerance=0)
    labels, centres, objective = naive_spherical(rows, rows[:4], 60)
    assert found.converged
    assert (found.labels == labels).all()
    torch.testing.assert_close(found.centres.double(), centres, rtol=0, atol=1e-5)
    assert found.objective == pytest.approx(objective, rel=1e-4)
    assert found.centres.norm(dim=1).sub(1).abs().max() < 1e-5


def test_cosine_ignores_length_and_euclidean_does_not():
    rows = torch.tensor([[1.0, 0], [9, 0.1], [0, 1], [0.1, 9]])
    assert same_partition(kmeans(rows, 2, ALONE, metric="cosine", init=rows[:3:2]).labels, [0, 0, 1, 1])
    assert same_partition(kmeans(rows, 3, ALONE, init=rows[[0, 1, 3]]).labels, [0, 1, 0, 2])


def test_unit_rows_under_means_that_are_not():
    """As if the rows had been brought to length 1 before."""
    rows = blobs(200, 5, 4, 2.0) * torch.rand(200, 1).add(0.1)
    plain = kmeans(F.normalize(rows, dim=1), 6, ALONE, seed=2)
    found = kmeans(rows, 6, ALONE, unit_rows=True, seed=2)
    assert torch.equal(plain.labels, found.labels)
    torch.testing.assert_close(plain.centres, found.centres)
    assert found.centres.norm(dim=1).max() < 1
    assert not torch.equal(found.labels, kmeans(rows, 6, ALONE, seed=2).labels)


@pytest.mark.parametrize("metric", module.METRICS)
@pytest.mark.parametrize("batch_rows", [0, 64])
def test_well_separated_groups_are_found(metric, batch_rows):
    rows = blobs(700, 16, 7, 0.2)
    found = kmeans(rows, 7, ALONE, metric=metric, batch_rows=batch_rows)
    assert same_partition(found.labels, np.arange(700) % 7)
    assert found.sizes.tolist() == [100] * 7
    assert (found.centres.shape, found.centres.dtype, found.labels.dtype) == ((7, 16), torch.float32, torch.int64)


def test_plus_plus_starts_better_than_random():
    rows = blobs(2000, 4, 40, 0.05, seed=3)
    means = {init: np.mean([kmeans(rows, 40, ALONE, init=init, passes=1, seed=s).objective for s in range(5)])
             for init in module.INITS}
    assert means["k-means++"] < 0.5 * means["random"]


def test_plus_plus_draws_by_squared_distance():
    """Two copies of one point and one far point: the second centre is always the other point."""
    rows = torch.tensor([[0.0, 0], [0, 0], [5, 5]]).repeat(20, 1)
    for seed in range(20):
        found = kmeans(rows, 2, ALONE, init="k-means++", passes=1, seed=seed)
        assert found.objective == 0
    # Squared distances 0, 1 and 9 from the first, and the better of two draws: the far row 99 times of 100.
    shared = module._SharedRows(torch.tensor([[0.0], [1], [-3]]), ALONE, unit=False, spherical=False)
    starts = [module._start(shared, 2, "k-means++", torch.Generator().manual_seed(seed)) for seed in range(2000)]
    far = [float(second) == -3 for first, second in starts if first == 0]
    assert 600 < len(far) < 740
    assert 0.98 < np.mean(far) < 1


def test_seeds_repeat_and_differ():
    rows = blobs(300, 6, 3, 3.0)
    runs = [kmeans(rows, 12, ALONE, seed=seed, init="random", passes=2) for seed in (0, 0, 1)]
    assert torch.equal(runs[0].labels, runs[1].labels)
    assert torch.equal(runs[0].centres, runs[1].centres)
    assert not same_partition(runs[0].labels, runs[2].labels)


@pytest.mark.parametrize("metric", module.METRICS)
def test_an_empty_cluster_starts_again_at_the_farthest_row(metric):
    """Two centres at one place: the second gets no row. The row that fits worst becomes its centre."""
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [0.0, 1.0], [-0.1, 1.0], [-1, -1]])
    found = kmeans(rows, 3, ALONE, metric=metric, init=rows[[0, 0, 3]])
    assert same_partition(found.labels, [0, 0, 0, 1, 1, 2])
    assert found.converged


def test_fewer_different_rows_than_clusters_end_with_empty_clusters():
    rows = torch.tensor([[1.0, 0], [0, 1], [1, 1]]).repeat(5, 1)
    for init in module.INITS:
        found = kmeans(rows, 6, ALONE, init=init)
        assert found.objective == pytest.approx(0, abs=1e-12)
        assert sorted(found.sizes.tolist()) == [0, 0, 0, 5, 5, 5]
        assert found.passes < 10


def test_as_many_clusters_as_rows():
    rows = blobs(9, 3)
    for init in module.INITS:
        found = kmeans(rows, 9, ALONE, init=init)
        assert found.sizes.tolist() == [1] * 9
        assert found.objective < 1e-10


def test_mini_batches_come_near_to_lloyd():
    """Against scikit-learn's Lloyd from several starts: within a few per cent of its objective."""
    cluster = pytest.importorskip("sklearn.cluster")
    rows = blobs(4000, 8, 10, 1.0, seed=5)
    best = cluster.KMeans(10, n_init=5, random_state=0).fit(rows.numpy()).inertia_ / len(rows)
    found = min(kmeans(rows, 10, ALONE, batch_rows=256, tolerance=1e-3, seed=s).objective for s in range(3))
    assert best * 0.999 < found < best * 1.05


def test_mini_batch_centres_are_running_means():
    """One pass with one cluster: the centre is the mean of all rows, whatever the batches."""
    rows = blobs(100, 4)
    shared = module._SharedRows(rows, ALONE, unit=False, spherical=False)
    with module.tqdm(disable=True) as bar:
        centres, done = module._mini_batches(shared, rows[:1].clone(), 1, 0, 7, torch.Generator(), bar)
    torch.testing.assert_close(centres[0], rows.mean(dim=0))
    assert done == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_and_chunk_size(dtype, monkeypatch):
    rows = blobs(200, 4, 5, 0.3).to(dtype)
    whole = kmeans(rows.float(), 5, ALONE, init=rows[:5].float())
    monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    parts = kmeans(rows, 5, ALONE, init=rows[:5])
    assert torch.equal(whole.labels, parts.labels)
    torch.testing.assert_close(whole.centres, parts.centres)


@pytest.mark.parametrize(("count", "options"), [(0, {}), (7, {}), (2, {"metric": "l1"}), (2, {"init": "first"})])
def test_what_makes_no_sense(count, options):
    with pytest.raises(ValueError, match="clusters of 6 rows|metric is one of"):
        kmeans(torch.randn(6, 2), count, ALONE, **options)


def share_of_clusters(rank, path):
    saved, process = torch.load(path, weights_only=True), Process(rank, 2, torch.device("cpu"))
    mine = (saved["rows"][:130], saved["rows"][130:])[rank]
    found = [kmeans(mine, 9, process, seed=1, **options) for options in saved["cases"]]
    torch.save([{"labels": x.labels, "centres": x.centres, "objective": x.objective, "passes": x.passes}
                for x in found], f"{path}.{rank}")


def test_two_processes_find_what_one_finds(tmp_path):
    """Unequal shares; one start has a doubled centre, so that re-seeding has to look at both ranks' rows."""
    rows = blobs(500, 6, 5, 2.0, seed=2)
    start = rows[[400, 400, *range(7)]]
    cases = [{"metric": metric, **more} for metric in module.METRICS for more in (
        {}, {"init": "random"}, {"batch_rows": 50, "tolerance": 1e-3}, {"init": start})]
    path = tmp_path / "two.pth"
    torch.save({"rows": rows, "cases": cases}, path)
    on_ranks(2, share_of_clusters, tmp_path, path)
    parts = [torch.load(f"{path}.{rank}", weights_only=True) for rank in range(2)]
    for options, first, second in zip(cases, *parts, strict=True):
        one = kmeans(rows, 9, ALONE, seed=1, **options)
        assert torch.equal(torch.cat([first["labels"], second["labels"]]), one.labels), options
        assert torch.equal(first["centres"], second["centres"])
        torch.testing.assert_close(first["centres"], one.centres, rtol=1e-5, atol=1e-5)
        assert first["objective"] == pytest.approx(one.objective, rel=1e-6)
        assert first["passes"] == second["passes"] == one.passes
