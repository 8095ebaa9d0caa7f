"""J and F by hand and against scipy's dilation and the toolkit's formulas; propagation against a loop over places."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evals.video import (
    Propagation,
    as_mask,
    boundary,
    dilate,
    follow,
    measure,
    one_hot,
    outline,
    region,
    seen_size,
    statistics,
    summary,
)


def box(top, left, bottom, right, shape=(20, 30)):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def test_region_by_hand():
    # 4 x 4 and 4 x 4, moved by 2: 8 shared of 24
    found = region(torch.stack([box(2, 2, 6, 6), box(2, 2, 6, 6), box(0, 0, 0, 0), box(0, 0, 0, 0)]),
                   torch.stack([box(2, 4, 6, 8), box(2, 2, 6, 6), box(0, 0, 2, 2), box(0, 0, 0, 0)]))
    assert found.tolist() == [pytest.approx(8 / 24), 1, 0, 1]


def test_outline_by_hand():
    # of a square the pixels to its upper left too, since a pixel is compared with those right and below
    expected = box(1, 1, 4, 4, (6, 6))
    expected[2:3, 2:3] = False
    assert outline(box(2, 2, 4, 4, (6, 6))[None])[0].equal(expected)
    corner = outline(box(4, 4, 6, 6, (6, 6))[None])[0]       # at the border it has no outline beyond
    assert corner.nonzero().tolist() == [[3, 3], [3, 4], [3, 5], [4, 3], [5, 3]]


@pytest.mark.parametrize("radius", [0, 1, 3, 8])
def test_dilation_is_scipys(radius):
    from scipy.ndimage import binary_dilation

    masks = torch.rand(3, 25, 31, generator=torch.Generator().manual_seed(0)) > 0.97
    x = np.arange(-radius, radius + 1)
    disk = x[:, None] ** 2 + x[None] ** 2 <= radius ** 2
    for mask, found in zip(masks, dilate(masks, radius), strict=True):
        assert np.array_equal(found.numpy(), binary_dilation(mask.numpy(), disk))


def toolkits_f(mask, truth, radius):
    """The toolkit's f_measure and _seg2bmap, in their steps, with scipy's dilation."""
    from scipy.ndimage import binary_dilation

    def border(seg):
        e, s, se = np.zeros_like(seg), np.zeros_like(seg), np.zeros_like(seg)
        e[:, :-1], s[:-1], se[:-1, :-1] = seg[:, 1:], seg[1:], seg[1:, 1:]
        b = seg ^ e | seg ^ s | seg ^ se
        b[-1], b[:, -1], b[-1, -1] = seg[-1] ^ e[-1], seg[:, -1] ^ s[:, -1], False
        return b

    x = np.arange(-radius, radius + 1)
    disk = x[:, None] ** 2 + x[None] ** 2 <= radius ** 2
    ours, theirs = border(mask), border(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = (ours & binary_dilation(theirs, disk)).sum() / ours.sum()
    recall = (theirs & binary_dilation(ours, disk)).sum() / theirs.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_boundary_against_the_toolkits_steps():
    generator = torch.Generator().manual_seed(1)
    shape = (60, 80)                                         # a diagonal of 100: 0.016 of it are 1.6, rounded up 2
    smooth = F.avg_pool2d(torch.rand(12, 1, *shape, generator=generator), 9, 1, 4)[:, 0] > 0.5
    other = F.avg_pool2d(torch.rand(12, 1, *shape, generator=generator), 9, 1, 4)[:, 0] > 0.49
    smooth[0] = other[1] = False                             # empty ones
    smooth[2] = other[2] = False
    other[3] = smooth[3]
    other[4] = smooth[4].roll(3, 1)
    found = boundary(smooth, other, 0.016)
    expected = [toolkits_f(a.numpy(), b.numpy(), 2) for a, b in zip(smooth, other, strict=True)]
    assert found.tolist() == pytest.approx(expected)
    assert [expected[i] for i in range(4)] == [0, 0, 1, 1]
    assert 0.3 < expected[5] < 0.999


def test_statistics_are_the_toolkits():
    values = np.array([1.0, 0.9, 0.7, 0.5, 0.6, 0.4, 0.2, 0.1, 0.3])
    # quarters of nine frames end at 1, 3, 5, 7, 9, both ends counted: first three and last three
    found = statistics(values)
    assert found == pytest.approx({"mean": values.mean(), "recall": 4 / 9,
                                   "decay": values[:3].mean() - values[6:].mean()})
    two = summary([{"J": [1.0, 1.0], "F": [0.5, 0.7]}, {"J": [0.0, 0.2], "F": [0.6, 0.8]}])
    assert two["J mean"] == pytest.approx(100 * (1 + 0.1) / 2)
    assert two["F mean"] == pytest.approx(100 * (0.6 + 0.7) / 2)
    assert two["F recall"] == pytest.approx(100 * (0.5 + 1) / 2)   # one half is not above one half
    assert two["J&F mean"] == pytest.approx((two["J mean"] + two["F mean"]) / 2)


def test_perfect_masks_measure_one():
    frames = [np.pad(np.array([[1, 1, 0], [1, 2, 2], [0, 2, 2]], dtype=np.uint8), 4) for _ in range(3)]
    found = measure(frames, frames, 2)
    assert found == {"J": [[1, 1, 1]] * 2, "F": [[1, 1, 1]] * 2}
    gone = measure([np.zeros_like(frames[0])], frames[:1], 2)
    assert gone == {"J": [[0], [0]], "F": [[0], [0]]}


def by_loops(target, features, labels, how):
    frames, _, h, w = features.shape
    out = torch.zeros(labels.shape[1], h, w)
    for i in range(h):
        for j in range(w):
            near = [(float(target[:, i, j] @ features[f, :, y, x]), f, y, x) for f in range(frames) for y in range(h)
                    for x in range(w) if abs(y - i) <= how.radius and abs(x - j) <= how.radius]
            near = sorted(near, reverse=True)[:how.top_k]
            weights = torch.tensor([score / how.temperature for score, *_ in near]).exp()
            for weight, (_, f, y, x) in zip(weights / weights.sum(), near, strict=True):
                out[:, i, j] += weight * labels[f, :, y, x]
    return out


@pytest.mark.parametrize(("radius", "top_k"), [(1, 3), (2, 5), (9, 400)])
def test_a_step_against_loops(radius, top_k, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(3, 4, 5, 6, generator=generator), dim=1)
    target = F.normalize(torch.randn(4, 5, 6, generator=generator), dim=0)
    labels = torch.rand(3, 2, 5, 6, generator=generator)
    how = Propagation(top_k, 7, radius, 0.1)
    expected = by_loops(target, features, labels, how)
    assert how.step(target, features, labels).allclose(expected, atol=1e-5)
    monkeypatch.setitem(__import__("evals.video").video.SCORES, "cpu", 1)   # one row of places at a time
    assert how.step(target, features, labels).allclose(expected, atol=1e-5)


def test_sizes_that_a_network_sees():
    assert seen_size(480, 854, 480) == (480, 832)            # DAVIS
    assert seen_size(854, 480, 480) == (832, 480)
    assert seen_size(100, 100, 96) == (96, 96)


def test_labels_and_masks():
    mask = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [3, 3, 0, 0], [3, 3, 0, 0]], dtype=np.uint8)
    soft = one_hot(mask, (2, 2), "cpu")
    assert soft.shape == (4, 2, 2)
    assert soft.argmax(0).tolist() == [[0, 1], [3, 0]]
    assert not soft[2].any()                                 # an object that is not seen
    assert np.array_equal(as_mask(one_hot(mask, (4, 4), "cpu"), (4, 4), (4, 4)), mask)
    weak = torch.tensor([[[0.9, 0.6]], [[0.1, 0.4]]])        # the object is brought to [0, 1] before it competes
    assert as_mask(weak, (1, 2), (1, 2)).tolist() == [[0, 1]]


def test_a_moving_square_is_followed():
    """By colours alone, with an encoder that pools them: what is red stays object 1, whatever way it goes."""
    generator = np.random.default_rng(0)
    frames, masks = [], []
    for step in range(8):
        top, left = 8 + 4 * step, 16 + 8 * step
        pixels = generator.integers(0, 60, (3, 64, 128))
        mask = np.zeros((64, 128), dtype=np.uint8)
        pixels[0, top:top + 16, left:left + 24] += 180
        mask[top:top + 16, left:left + 24] = 1
        frames.append(torch.from_numpy(pixels.astype(np.uint8)))
        masks.append(mask)

    def encode(images):
        return F.avg_pool2d(images, 4) - 60

    found = list(follow(frames, masks[0], encode, Propagation(radius=4), short_side=64))
    assert len(found) == 7
    scores = measure(found, masks[1:], 1)
    assert min(scores["J"][0]) > 0.9
    assert min(scores["F"][0]) > 0.9
    stuck = list(follow(frames, masks[0], encode, Propagation(radius=1, context=0), short_side=64))
    assert measure(stuck, masks[1:], 1)["J"][0][-1] < 0.2     # the first frame alone, no further than a place
