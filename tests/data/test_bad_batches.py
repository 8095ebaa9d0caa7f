"""Images that cannot be opened: replaced, reported, counted, or refused by name."""

import pytest
import torch
from helpers.noise import SIZE, N, Source, augment, epoch_of

from data.augment import eval_transform
from data.loader import BadImageLog, Batch, EvaluationDataset, ViewDataset
from runtime.errors import UserError


def original_of():
    """Image bytes as evaluation sees them -> index."""
    return {evaluated([i], Source()).views[0].numpy().tobytes(): i for i in range(N)}


def evaluated(keys, source):
    return EvaluationDataset(source, eval_transform(SIZE)).__getitems__(keys)


@pytest.mark.parametrize("broken", [[0], [5, 6], list(range(1, N))])
@pytest.mark.parametrize("path", ["fast", "pil"])
def test_bad_images_are_replaced_and_reported(broken, path):
    dataset = ViewDataset(Source(broken), [augment()], 0, path)
    good = [i for i in range(N) if i not in broken]
    for stamp in range(30):
        batch = dataset.__getitems__([(broken[0], stamp)])
        assert batch.indices.tolist() == [broken[0]]
        assert batch.bad[0] == (broken[0], f"broken {broken[0]}")
        assert all(i in broken for i, _ in batch.bad)
        if batch.views:
            candidates, = ViewDataset(Source(), [augment()], 0, path).__getitems__([(i, stamp) for i in good]).views
            assert (candidates == batch.views[0]).all(dim=(1, 2, 3)).any()
        else:
            assert len(batch.bad) == 9
        assert dataset.__getitems__([(broken[0], stamp)]).bad == batch.bad


def test_replacements_vary():
    keys = [(0, stamp) for stamp in range(60)]
    batch = ViewDataset(Source([0]), [augment()], 0, "fast").__getitems__(keys)
    assert [entry[0] for entry in batch.bad].count(0) >= 60  # each place of the batch has its own
    alone = [ViewDataset(Source([0]), [augment()], 0, "fast").__getitems__([key]) for key in keys]
    assert torch.equal(batch.views[0], torch.cat([x.views[0] for x in alone]))
    assert batch.decoded == 60


def test_evaluation_replaces_and_reports_too():
    batch = evaluated(list(range(N)), Source([4, 11]))
    of = original_of()
    shown = [of[view.numpy().tobytes()] for view in batch.views[0]]
    assert [i for i, s in enumerate(shown) if i != s] == [4, 11]
    assert [i for i, _ in batch.bad if i in (4, 11)][0] == 4
    assert not {4, 11} & set(shown)


def test_good_images_of_the_batch_are_untouched():
    for broken, whole in zip(epoch_of(broken=[7]), epoch_of(), strict=True):
        good = whole.indices != 7
        assert torch.equal(broken.indices, whole.indices)
        assert torch.equal(broken.views[0][good], whole.views[0][good])
        assert [i for i, _ in broken.bad] == ([] if good.all() else [7])


@pytest.mark.parametrize("workers", [0, 1])
def test_when_nothing_can_be_opened_the_batch_says_so(workers):
    batches = epoch_of(workers, broken=range(N))
    assert all(batch.views == () and len(batch.bad) == 4 * 9 for batch in batches)
    log = BadImageLog(Source(range(N)), "skip")
    with pytest.raises(UserError, match="noise/") as caught:
        log.check(batches[0])
    assert "\n" not in str(caught.value)


def test_error_policy_names_the_file_and_the_way_out():
    log = BadImageLog(Source(), "error")
    for batch in epoch_of():
        log.check(batch)
    assert log.summary() == ""
    (bad,) = (batch for batch in epoch_of(broken=[7]) if batch.bad)
    with pytest.raises(UserError) as caught:
        log.check(bad)
    text = str(caught.value)
    assert "noise/000007" in text
    assert "broken 7" in text
    assert "--on-bad-image skip" in text
    assert "\n" not in text
    assert not caught.value.every_process  # only the process that met it can name it


def test_skip_policy_counts():
    log = BadImageLog(Source(), "skip")
    for epoch in range(3):
        for batch in epoch_of(epoch=epoch, broken=[7]):
            log.check(batch)
    summary = log.summary()
    assert "\n" not in summary
    assert "noise/000007 (broken 7)" in summary
    assert "opened: 1," in summary
    assert log.counts[7] >= 3
    assert f"{log.counts[7]} times" in summary


def test_long_summary_is_cut():
    log = BadImageLog(Source(), "skip")
    log.check(Batch((torch.zeros(1),), torch.zeros(1), [(i, "r") for i in range(12)]))
    assert log.summary().count("noise/") == 5
    assert log.summary().endswith("...")


def test_unknown_policy():
    with pytest.raises(UserError, match="--on-bad-image ignore"):
        BadImageLog(Source(), "ignore")
