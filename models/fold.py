"""Folding batch norm, which is an affine map in evaluation mode, into the convolution before it."""

from __future__ import annotations

import copy
from collections import Counter

from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_weights

KINDS = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))


def fold_batch_norm(network: nn.Module) -> tuple[nn.Module, int]:
    """A copy of a frozen ``network`` whose batch norms are folded into the convolutions before them, and their number.

    The copy has modules with the same names; a convolution gets a bias, and its batch norm becomes an identity.
    Products are computed in float64 and rounded once. A network that cannot be traced (its control flow depends on the
    images) is copied unchanged, with the number 0.
    """
    network = copy.deepcopy(network).eval()
    pairs = foldable(network)
    for conv_name, norm_name in pairs:
        conv, norm = network.get_submodule(conv_name), network.get_submodule(norm_name)
        weight, *rest = (None if x is None else x.detach().double() for x in (
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias))
        fused = fuse_conv_bn_weights(weight, *rest[:3], norm.eps, *rest[3:])
        conv.weight, conv.bias = (nn.Parameter(x.to(conv.weight.dtype), conv.weight.requires_grad) for x in fused)
        network.set_submodule(norm_name, nn.Identity())
    return network, len(pairs)


def foldable(network: nn.Module) -> list[tuple[str, str]]:
    """The names of (convolution, batch norm) pairs that can be folded: each module is called once, and nothing else
    uses the output of the convolution."""
    try:
        graph = fx.Tracer().trace(network)
    except Exception:  # tracing runs the network's code with a placeholder for images, and that may raise anything
        return []
    modules = dict(network.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[node.target]) for node in graph.nodes if node.op == "call_module")
    found = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1:
            conv, norm = modules[before.target], modules[node.target]
            if ((type(conv), type(norm)) in KINDS and norm.running_var is not None
                    and calls[id(conv)] == calls[id(norm)] == 1):
                found.append((before.target, node.target))
    return found
