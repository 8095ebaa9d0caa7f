"""Networks of torchvision's own parts that it has no builder for, so that a whole run takes a fraction of a second:

``shufflenet_small``, 1,024 wide and with batch norm, has one unit a stage where shufflenet_v2_x0_5 has four and eight;
``squeezenet_small``, 512 wide and without, two fire modules where squeezenet1_1 has eight; ``resnet_small``, 128 wide,
has a quarter of resnet18's channels and one block a stage. Importing this makes ``--arch`` know them, in this process;
:mod:`helpers.interpreter` imports it for the scripts.
"""

from torch import nn
from torchvision.models import ResNet, ShuffleNetV2, SqueezeNet
from torchvision.models._api import BUILTIN_MODELS
from torchvision.models.resnet import BasicBlock
from torchvision.models.squeezenet import Fire


def shufflenet_small(*, weights=None, **options):
    return ShuffleNetV2([1, 1, 1], [24, 48, 96, 192, 1024], **options)


def squeezenet_small(*, weights=None, **options):
    model = SqueezeNet("1_1", **options)
    model.features = nn.Sequential(*model.features[:4], nn.MaxPool2d(3, 2, ceil_mode=True), Fire(128, 32, 256, 256))
    return model


def resnet_small(*, weights=None, num_classes=1000):
    model = ResNet(BasicBlock, [1, 1, 1, 1])
    model.inplanes, model.bn1, model.fc = 16, nn.BatchNorm2d(16), nn.Linear(128, num_classes)
    model.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
    for i, stride in enumerate((1, 2, 2, 2)):
        setattr(model, f"layer{i + 1}", model._make_layer(BasicBlock, 16 << i, 1, stride))
    return model


for _builder in (shufflenet_small, squeezenet_small, resnet_small):
    _builder.__module__ = "torchvision.models.small"  # the package whose networks the project lists
    BUILTIN_MODELS[_builder.__name__] = _builder
