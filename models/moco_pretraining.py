"""The two networks of MoCo v2, with an MLP head and shuffled batch norm; losses/moco.py has its loss and queue.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, algorithm 1 and
section 3.3; Chen et al., "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from models.backbones import attach_head, build_backbone
from models.heads import HeadNorm, mlp
from models.momentum import BatchNormParts, ContrastedWidth, Momentum, follow, shuffled
from models.teachers import IMAGENET_MEAN, IMAGENET_STD, Encoder, Normalise
from runtime.device import need_memory
from runtime.settings import Setting


class MoCoEncoders(nn.Module):
    """Query encoder and momentum encoder, under the names of MoCo's own checkpoints.

    ``bn_parts``: see :func:`models.momentum.shuffled`.

    ``head_bn`` puts batch norm after both linear layers of the head, as SimCLR v2 and MoCo v3 do and MoCo v2 does
    not. A randomly initialised network maps all images to nearly one direction, which drifts. At first it therefore
    lowers the loss by telling new keys from old ones instead of telling images apart. With small networks this phase
    can outlast a short training; centring the features prevents it.

    ``freeze_trunk``: only the head is trained; all tensors of the trunk stay unchanged, including the statistics of its
    batch norm. ``mean``, ``std``: the normalisation that the trunk was trained with, for images in [0, 1].
    """

    def __init__(self, backbone: nn.Module, moco_dim: ContrastedWidth = 128, moco_m: Momentum = 0.999,
                 bn_parts: BatchNormParts = 8, head_bn: HeadNorm = False,
                 freeze_trunk: Annotated[bool, Setting(
                     "train only the head, on the frozen trunk of --weights, for losses that need the teacher's own "
                     "head (--loss seed, disco, ...) if its file has none")] = False,
                 mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        self.spec = backbone.spec
        need_memory(16 * moco_dim * self.spec.feature_dim, f"--moco-dim {moco_dim}")  # two heads
        head = mlp(self.spec.feature_dim, self.spec.feature_dim, moco_dim, head_bn)
        self.encoder_q = attach_head(backbone.requires_grad_(not freeze_trunk), head)
        self.head_name = next(name for name, module in backbone.named_modules() if module is head)
        self.freeze_trunk, self.mean, self.std = freeze_trunk, tuple(mean), tuple(std)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.normalise = Normalise(mean, std)
        self.momentum, self.bn_parts = moco_m, bn_parts

    def train(self, mode: bool = True) -> MoCoEncoders:
        super().train(mode)
        if self.freeze_trunk:
            for encoder in (self.encoder_q, self.encoder_k):
                encoder.eval().get_submodule(self.head_name).train(mode)
        return self

    def forward(self, query_images: Tensor, key_images: Tensor) -> tuple[Tensor, Tensor]:
        """Two views of the same images, uint8 [b, 3, H, W], to q, and k without gradient, [b, dim] each."""
        q = self.encoder_q(self.normalise(query_images))
        follow(self.encoder_k, self.encoder_q, self.momentum)
        return q, self.encode_keys(key_images)

    def encode_keys(self, images: Tensor) -> Tensor:
        """k for ``images``, in their order, computed on a batch that is shuffled across processes (section 3.3)."""
        keys, = shuffled(lambda part: (self.encoder_k(self.normalise(part)),), images, self.bn_parts)
        return keys

    def encoder_state(self) -> dict[str, Tensor]:
        """The state dict of the query encoder with its head, under the keys of MoCo's released files."""
        return {f"module.encoder_q.{k}": v.contiguous() for k, v in self.encoder_q.state_dict().items()}

    def trunk(self) -> Encoder:
        """A copy of the query encoder without its head, as an encoder of uint8 images."""
        with torch.random.fork_rng(devices=[]):  # copying the network must not change the training
            trunk = build_backbone(**self.spec.record())
        wanted, have = trunk.state_dict(), self.encoder_q.state_dict()
        wanted.update((name, have[name]) for name in wanted)
        trunk.load_state_dict(wanted)
        return Encoder(trunk, self.mean, self.std).to(next(self.parameters()).device)

    def record(self) -> dict[str, Any]:
        """The description of the encoder that its checkpoint records."""
        return {**self.spec.identity(), "mean": list(self.mean), "std": list(self.std)}
