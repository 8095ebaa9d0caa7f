"""The moving average of a network, number by number."""

import torch
from torch import nn

from models.average import MovingAverage


def test_parameters_and_running_statistics_move_and_counts_are_taken_over():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last).train()
    average = MovingAverage(network, 0.9)
    expected = {name: value.clone().double() for name, value in network.state_dict().items()}
    for _ in range(3):
        network(torch.randn(5, 3, 6, 6))
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))
        average.update(network)
        for name, value in network.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value.double()
    for name, value in average.network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert value == 3
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in average.parameters())
    assert {key.partition(".")[0] for key in average.state_dict()} == {"network"}
