"""MoCo v2: momentum contrast with a queue, an MLP head and shuffled batch norm.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, algorithm 1 and
section 3.3; Chen et al., "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import attach_head, build_backbone
from models.heads import HeadNorm, mlp
from models.momentum import BatchNormParts, ContrastedWidth, Momentum, follow, shuffled
from models.teachers import IMAGENET_MEAN, IMAGENET_STD, Encoder, Normalise
from runtime.device import all_gather, need_memory
from runtime.settings import Setting


class MoCo(nn.Module):
    """Query encoder, momentum encoder and queue, under the names of MoCo's own checkpoints.

    ``bn_parts``: see :func:`models.momentum.shuffled`.

    ``head_bn`` puts batch norm after both linear layers of the head, as SimCLR v2 and MoCo v3 do and MoCo v2 does
    not. A fresh network maps all images to nearly one direction, which drifts; until it has learnt otherwise the
    loss is lowered by telling new keys from old ones, not images. On small networks that takes longer than a short
    training lasts; centring the features ends it at once.

    ``freeze_trunk``: only the head trains; the trunk keeps every tensor, the statistics of its batch norm included.
    ``mean``, ``std``: what the trunk was trained with, of images in [0, 1].
    """

    def __init__(self, backbone: nn.Module, moco_dim: ContrastedWidth = 128,
                 moco_k: Annotated[int, Setting("keys in the queue; default {default}, MoCo's", least=1,
                                                metavar="K")] = 65536,
                 moco_m: Momentum = 0.999,
                 moco_t: Annotated[float, Setting("temperature; default {default}, MoCo v2's", above=0,
                                                  metavar="T")] = 0.2,
                 bn_parts: BatchNormParts = 8, head_bn: HeadNorm = False,
                 freeze_trunk: Annotated[bool, Setting(
                     "train the head alone, on the trunk of --weights as it is: for losses that compare with a "
                     "teacher's own head (--loss seed, disco, ...) where its file has none")] = False,
                 mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        self.spec = backbone.spec
        need_memory(4 * moco_dim * (3 * moco_k + 4 * self.spec.feature_dim),  # the queue as it is made; two heads
                    f"--moco-k {moco_k} with --moco-dim {moco_dim}")
        head = mlp(self.spec.feature_dim, self.spec.feature_dim, moco_dim, head_bn)
        self.encoder_q = attach_head(backbone.requires_grad_(not freeze_trunk), head)
        self.head_name = next(name for name, module in backbone.named_modules() if module is head)
        self.freeze_trunk, self.mean, self.std = freeze_trunk, tuple(mean), tuple(std)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.normalise = Normalise(mean, std)
        self.momentum, self.temperature, self.bn_parts = moco_m, moco_t, bn_parts
        self.register_buffer("queue", F.normalize(torch.randn(moco_dim, moco_k), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def train(self, mode: bool = True) -> MoCo:
        super().train(mode)
        if self.freeze_trunk:
            for encoder in (self.encoder_q, self.encoder_k):
                encoder.eval().get_submodule(self.head_name).train(mode)
        return self

    def forward(self, query_images: Tensor, key_images: Tensor) -> dict[str, Tensor]:
        """Two views of the same images, uint8 [b, 3, H, W]; returns ``loss`` and ``accuracy`` (of the positive)."""
        q = F.normalize(self.encoder_q(self.normalise(query_images)), dim=1)     # [b, dim]
        with torch.no_grad():
            follow(self.encoder_k, self.encoder_q, self.momentum)
            k = self._encode_keys(key_images)                                    # [b, dim]
        with torch.autocast(q.device.type, enabled=False):
            q, k = q.float(), k.float()
            positive = (q * k).sum(1, keepdim=True)                              # [b, 1]
            negative = q @ self.queue.clone()                                    # [b, queue]
            logits = torch.cat([positive, negative], dim=1) / self.temperature
            target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
            loss = F.cross_entropy(logits, target)
        accuracy = (logits.detach().argmax(1) == 0).float().mean()
        self._enqueue(k)
        return {"loss": loss, "accuracy": accuracy}

    def _encode_keys(self, images: Tensor) -> Tensor:
        """Keys in the order of ``images``, computed over a batch shuffled across processes (section 3.3)."""
        keys, = shuffled(lambda part: (self.encoder_k(self.normalise(part)).float(),), images, self.bn_parts)
        return F.normalize(keys, dim=1)

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        keys = all_gather(keys)
        size, start = self.queue.shape[1], self.queue_ptr
        places = (start + torch.arange(len(keys), device=keys.device)) % size
        self.queue[:, places] = keys.T
        self.queue_ptr[0] = (start + len(keys)) % size

    def encoder_state(self) -> dict[str, Tensor]:
        """The query encoder with its head, under the keys of MoCo's released files."""
        return {f"module.encoder_q.{k}": v.contiguous() for k, v in self.encoder_q.state_dict().items()}

    def trunk(self) -> Encoder:
        """A copy of the query encoder without its head, as an encoder of uint8 images."""
        with torch.random.fork_rng(devices=[]):  # copying the network must not change the training
            trunk = build_backbone(**self.spec.record())
        wanted, have = trunk.state_dict(), self.encoder_q.state_dict()
        wanted.update((name, have[name]) for name in wanted)
        trunk.load_state_dict(wanted)
        return Encoder(trunk, self.mean, self.std).to(self.queue.device)

    def record(self) -> dict[str, Any]:
        """What the encoder is, for its checkpoint."""
        return {**self.spec.record(), "mean": list(self.mean), "std": list(self.std)}
