"""Your own student: a function that returns the network.

    python train_distill.py --data DIR --distill teacher.pth -a examples/my_model.py:build --output run
    python compute_knn.py eval --data DIR --weights run/student.pth -a examples/my_model.py:build

The network takes normalised images, float32 [b, 3, H, W], and returns features [b, d] or, as here, a feature map
[b, d, h, w], over which the mean is taken. So you can distil into the backbone of a detector; after the training its
weights are in run/student_trunk.pth.
"""

from torch import Tensor, nn


class SmallBackbone(nn.Module):
    """Three convolutional stages; each halves the resolution."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        channels = [3, width, 2 * width, 4 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in zip(channels[:-1], channels[1:], strict=True))

    def forward(self, images: Tensor) -> Tensor:
        for stage in self.stages:
            images = stage(images)
        return images                      # [b, 4 * width, H / 8, W / 8]


def build() -> nn.Module:
    """The network. This is called without arguments, after the random seed has been set."""
    return SmallBackbone()
