"""torchvision's Faster R-CNN with a feature pyramid, on one of our trunks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchvision.models import ResNet
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

from runtime.errors import UserError

STAGES = ("layer1", "layer2", "layer3", "layer4")  # strides 4, 8, 16, 32
NORMS = ("batch", "frozen")
PYRAMID = 256  # channels


def faster_rcnn(trunk: nn.Module, mean: Sequence[float], std: Sequence[float], classes: int, norm: str = "batch",
                sizes: Sequence[int] = (800,), longest: int = 1333) -> FasterRCNN:
    """A detector of ``classes`` classes, labelled from 1, on a ResNet ``trunk``, whose weights it keeps.

    It takes float images [3, H, W] in [0, 1] of any sizes and normalises them by ``mean`` and ``std``. It resizes the
    shorter side to one of ``sizes``, random for each image in training and the last in evaluation, and the longer side
    to at most ``longest`` pixels. ``norm``: ``batch`` trains all layers including batch norm, which is in the pyramid
    too, as in MoCo's protocol (He et al., CVPR 2020, section 4.2); ``frozen`` makes the trunk's batch norm a fixed
    scale and freezes the stem and the first stage, the usual protocol after supervised pretraining. Raises
    :class:`UserError` for other networks.
    """
    if not isinstance(trunk, ResNet):
        raise UserError(f"--weights is a {trunk.spec.arch}, expected a ResNet, on which the detector is built; give "
                        "the checkpoint of a ResNet")
    if trunk.spec.stem != "imagenet":
        raise UserError(f"--weights has the stem {trunk.spec.stem}, which is for small images, but the detector's "
                        "anchors are for the stem imagenet; give a network with that stem")
    trunk.requires_grad_(True)
    if norm == "frozen":
        freeze_norm(trunk)
        for part in (trunk.conv1, trunk.layer1):
            part.requires_grad_(False)
    widths = [_width(getattr(trunk, stage)) for stage in STAGES]
    backbone = BackboneWithFPN(trunk, {stage: str(i) for i, stage in enumerate(STAGES)}, widths, PYRAMID,
                               norm_layer=nn.BatchNorm2d if norm == "batch" else None)
    return FasterRCNN(backbone, classes + 1, min_size=tuple(sizes), max_size=longest, image_mean=list(mean),
                      image_std=list(std))


def freeze_norm(module: nn.Module) -> None:
    """Replace each batch norm in ``module`` by the fixed scale and shift that it applies in evaluation mode."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            fixed = FrozenBatchNorm2d(child.num_features, child.eps)
            fixed.load_state_dict({key: value for key, value in child.state_dict().items()
                                   if key != "num_batches_tracked"})
            setattr(module, name, fixed)
        else:
            freeze_norm(child)


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """The trained parameters for an optimizer, without weight decay for those of normalisation, as in detectron2."""
    scales = {id(p) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
              for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if id(p) not in scales]},
            {"params": [p for p in trained if id(p) in scales], "weight_decay": 0.0}]


def _width(stage: nn.Sequential) -> int:
    """The number of output channels of a stage."""
    convolutions = [m for m in stage[-1].children() if isinstance(m, nn.Conv2d)]
    return convolutions[-1].out_channels
