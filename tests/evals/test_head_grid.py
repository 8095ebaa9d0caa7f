import numpy as np
import torch
from torch import nn

from evals.head_grid import Scale, sgd_heads, split_validation


def data(n=60, d=5, classes=3):
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(classes, d, generator=generator)
    labels = torch.arange(n) % classes
    return 3 + 2 * (centres[labels] + 0.7 * torch.randn(n, d, generator=generator)), labels


def test_each_head_is_what_torchs_sgd_makes_of_it_alone():
    features, labels = data()
    grid = [(0.1, 0.0), (0.02, 0.1)]
    heads = sgd_heads(features, labels, 3, grid, epochs=3, batch_size=16, seed=4)
    scaled = (features - features.mean(0)) / features.std(0, unbiased=False)
    for number, (rate, decay) in enumerate(grid):
        head = nn.Linear(5, 3)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD([{"params": [head.weight], "weight_decay": decay}, {"params": [head.bias]}],
                                    rate, 0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        generator = torch.Generator().manual_seed(4)
        for _ in range(3):
            for rows in torch.randperm(60, generator=generator).split(16)[:3]:
                optimizer.zero_grad()
                nn.functional.cross_entropy(head(scaled[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(heads.weight[number], head.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads.bias[number], head.bias.detach(), rtol=1e-4, atol=1e-5)
        expected = 100 * (head(scaled).argmax(1) == labels).double().mean()
        assert heads.accuracy(features, labels)[number, 0] == expected


def test_a_feature_that_does_not_vary_becomes_nothing():
    features = torch.randn(50, 3)
    features[:, 1] = 7.3
    rows = Scale.of(features)(features)
    assert (rows[:, 1] == 0).all()
    torch.testing.assert_close(rows[:, [0, 2]].std(0, unbiased=False), torch.ones(2))


def test_validation_is_a_share_of_each_class_and_leaves_one():
    labels = np.array([0] * 20 + [1] * 10 + [2])
    fit, held = split_validation(labels, 0.5, 0)
    assert np.bincount(labels[held], minlength=3).tolist() == [10, 5, 0]
    assert sorted([*fit, *held]) == list(range(31))
    assert not np.array_equal(held, split_validation(labels, 0.5, 1)[1])
