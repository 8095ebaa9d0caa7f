"""The user's own network, FILE.py:NAME, as a trunk: a forward pass checks it, and feature maps are pooled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.errors import memory_that_ran_out
from runtime.own import Own

HEAD = "head_of_coss"  # name of an identity layer after the features; a head that is attached replaces it


class OwnNetwork:
    """Mixed into the network's class: ``forward`` returns the network's own features [b, d], or the mean over its
    feature map [b, d, h, w]."""

    pools = False

    def forward(self, images: Tensor) -> Tensor:
        features = super().forward(images)
        return getattr(self, HEAD)(features.mean(dim=(2, 3)) if self.pools else features)


def build_own(own: Own, image_size: int) -> tuple[nn.Module, int]:
    """The network that the user's function or class returns, and the width of its features.

    It is called without arguments. The network must map normalised images, float32 [b, 3, S, S], to features [b, d] or
    a feature map [b, d, h, w]; otherwise :class:`UserError` is raised. The names of its parameters do not change.
    """
    with own.blamed("while it builds the network"):
        model = own.value()
    wanted = "return an nn.Module that maps images [b, 3, H, W] to features [b, d] or a map [b, d, h, w]"
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise own.error(f"returns a {type(model).__name__}", wanted)
    features = _try_out(own, model, image_size)
    if not isinstance(features, Tensor) or features.ndim not in (2, 4) or len(features) != 2 or not (
            features.is_floating_point() and features.shape[1]):
        found = (f"{features.dtype} {list(features.shape)}" if isinstance(features, Tensor) else
                 f"a {type(features).__name__}")
        raise own.error(f"returns {found} for images [2, 3, {image_size}, {image_size}]", wanted)
    kind = type(model)
    model.__class__ = type(kind.__name__, (OwnNetwork, kind), {"pools": features.ndim == 4})
    model.add_module(HEAD, nn.Identity())
    return model.train(), features.shape[1]


@torch.no_grad()
def _try_out(own: Own, model: nn.Module, image_size: int) -> object:
    with own.blamed(f"on images of {image_size} pixels"):
        try:
            return model.eval()(torch.zeros(2, 3, image_size, image_size))
        except (MemoryError, RuntimeError) as error:
            if memory := memory_that_ran_out(error):
                raise own.error(f"at --image-size {image_size}: {memory}", "use a smaller size") from None
            raise
