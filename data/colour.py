"""Colour jitter, greyscale, blur and solarise of uint8 batches, each image with its own parameters.

The operations round and clip where Pillow does, so equal parameters give Pillow's pixels except for rare last bits
(less than 0.1 of 255 on average).

There are two implementations. A GPU takes the whole batch through one fixed list of operations: jitter in any order is
at most three blends, then hue, then at most three blends, and an operation that an image does not need becomes a blend
that changes nothing. So the host never waits for the device, and no shape depends on random numbers. A CPU takes each
image through the operations that it needs, which keeps the data in its caches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment import BRIGHTNESS, CONTRAST, GREY, HUE, JITTER_ORDERS, ORDER, SATURATION, SIGMA, SOLARIZE
from runtime.device import send

LARGE = 64  # side in pixels from which a CPU is faster image by image
CHUNK = 100_000  # values that a CPU processes at a time if the images are smaller


def apply_colour(images: Tensor, colour: Tensor) -> Tensor:
    """uint8 [b, 3, S, S] on any device, float32 [b, 8] (data.augment.COLOUR) on the host -> uint8 [b, 3, S, S]."""
    if images.device.type != "cpu":
        return colour_batch(images, colour)
    if images.shape[-1] >= LARGE:
        return torch.stack([colour_image(image, row) for image, row in zip(images, colour.tolist(), strict=True)])
    step = max(1, CHUNK // images[0].numel())
    return torch.cat([colour_batch(*part) for part in zip(images.split(step), colour.split(step), strict=True)])


# ---- one image, only the operations that it needs


def colour_image(image: Tensor, value: list[float]) -> Tensor:
    """uint8 [3, S, S] and its 8 parameters -> uint8 [3, S, S]."""
    if value[ORDER] < 0 and not value[GREY] and not value[SIGMA] and value[SOLARIZE] > 255:
        return image
    x = image.float()[None]
    if value[GREY] == 1:
        x = _luma(x).expand_as(x)
    if value[ORDER] >= 0:
        for column in JITTER_ORDERS[int(value[ORDER])]:
            if column == HUE:
                x = _turn_hue(x, _hue_steps(torch.tensor(value[HUE])))
            elif column == BRIGHTNESS:
                x = _clip(x * value[BRIGHTNESS])
            else:
                grey = _luma(x)
                x = _blend(x, _mean(grey) if column == CONTRAST else grey, value[column])
    if value[GREY] == 2:
        x = _luma(x).expand_as(x)
    if value[SIGMA] > 0:
        x = _blur_image(x[0], value[SIGMA])[None]
    if value[SOLARIZE] < 256:
        x = torch.where(x >= value[SOLARIZE], 255 - x, x)
    return x[0].to(torch.uint8)


# ---- a batch, one fixed list of operations


def colour_batch(images: Tensor, colour: Tensor, compiled: bool = False) -> Tensor:
    """uint8 [b, 3, S, S] and float32 [b, 8] on the host -> uint8 [b, 3, S, S], all images at once.

    compiled: use torch.compile, which gives the same pixels. Not the default: on a CPU compiling takes longer than it
    saves, and on a GPU it has not been measured (benchmarks/data_path.py --device does).
    """
    jittered = colour[:, ORDER] >= 0
    table = _blend_table(colour)  # [b, 6, 3]
    values = torch.stack([colour[:, GREY], jittered.float(), _hue_steps(colour[:, HUE]), colour[:, SIGMA],
                          colour[:, SOLARIZE]], 1)  # [b, 5]
    taken = bool(jittered.any()), bool((colour[:, SIGMA] > 0).any()), bool((colour[:, SOLARIZE] < 256).any())
    work = _compiled() if compiled else _colour
    table, values = (send(x, images.device)[..., None, None, None] for x in (table, values))
    return work(images, table, values, *taken)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_colour)


def _colour(images: Tensor, table: Tensor, values: Tensor, turns: bool, blurs: bool, solarizes: bool) -> Tensor:
    """The list of operations. table [b, 6, 3, 1, 1, 1], values [b, 5, 1, 1, 1]. turns, blurs and solarizes say whether
    any image needs that operation; otherwise it is skipped."""
    blends = [part.unbind(1) for part in table.unbind(1)]  # 6 times (factor, grey, mean)
    grey, jittered, hue, sigma, solarize = values.unbind(1)
    x = images.float()
    x = torch.where(grey == 1, _luma(x), x)
    for blend in blends[:3]:
        x = _blend_any(x, *blend)
    if turns:
        x = torch.where(jittered > 0, _turn_hue(x, hue), x)
    for blend in blends[3:]:
        x = _blend_any(x, *blend)
    x = torch.where(grey == 2, _luma(x), x)
    if blurs:
        x = _blur_batch(x, sigma[..., 0])
    if solarizes:
        x = torch.where(x >= solarize, 255 - x, x)
    return x.to(torch.uint8)


def _blend_table(colour: Tensor) -> Tensor:
    """[b, 6, 3]: three blends before hue and three after it, each as (factor, weight of the pixel's grey, weight of the
    mean grey)."""
    jittered = colour[:, ORDER] >= 0
    orders = torch.tensor(JITTER_ORDERS, device="cpu")[colour[:, ORDER].clamp_min(0).long()]  # [b, 4]
    hue_at = (orders == HUE).int().argmax(1, keepdim=True)
    factor = colour.gather(1, orders)
    kind = torch.stack([factor, (orders == SATURATION).float(), (orders == CONTRAST).float()], 2)  # [b, 4, 3]
    nothing = torch.tensor([1.0, 0.0, 0.0], device="cpu")
    place = torch.arange(4, device="cpu")
    before = torch.where((jittered[:, None] & (place < hue_at))[..., None], kind, nothing)[:, :3]
    after = torch.where((jittered[:, None] & (place > hue_at))[..., None], kind, nothing)[:, 1:]
    return torch.cat([before, after], 1)


def _blend_any(x: Tensor, factor: Tensor, pixel: Tensor, mean: Tensor) -> Tensor:
    grey = _luma(x)
    return _blend(x, pixel * grey + mean * _mean(grey), factor)


# ---- the operations, on float32 [b, 3, H, W] with whole numbers as values


def _luma(x: Tensor) -> Tensor:
    """Pillow's convert("L"), [b, 1, H, W]. All numbers are whole and below 2**24, so float32 is exact."""
    r, g, b = x.split(1, 1)
    return (r * 19595 + g * 38470 + b * 7471).add_(32768).mul_(2.0**-16).floor_()


def _mean(grey: Tensor) -> Tensor:
    return (grey.mean((2, 3), keepdim=True) + 0.5).floor_()


def _blend(x: Tensor, other: Tensor, factor: Tensor | float) -> Tensor:
    """Pillow's Image.blend(other, x, factor), which extrapolates if factor is below 0 or above 1."""
    return _clip(torch.lerp(other.expand_as(x), x, factor) if isinstance(factor, float)
                 else other + factor * (x - other))


def _clip(x: Tensor) -> Tensor:
    return x.clamp_(0, 255).floor_()


def _hue_steps(hue: Tensor) -> Tensor:
    """Change of hue as torchvision hands it to Pillow: in 255ths of a turn, rounded towards zero."""
    return (hue.double() * 255).trunc().float()


def _turn_hue(x: Tensor, steps: Tensor) -> Tensor:
    """Add to the hue in HSV, with hue and saturation in 8 bits as in Pillow (A. R. Smith, SIGGRAPH 1978).

    It uses only sums and products, because torch.where and torch.remainder take ten times as long on a CPU.
    """
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    is_r = (value - r).eq_(0)
    is_g = (value - g).eq_(0).mul_(1 - is_r)
    is_b = 1 - is_r - is_g
    sector = is_r * (g - b) + is_g * (b - r) + is_b * (r - g)
    sector.div_(chroma.clamp_min(1)).addcmul_(is_g, is_g, value=2).addcmul_(is_b, is_b, value=4).div_(6)
    hue = sector.sub_(sector.floor()).mul_(255).floor_().add_(steps.reshape(-1, 1, 1))
    hue = hue.sub_((hue / 256).floor_(), alpha=256).mul_(6 / 255)
    drop = (chroma * 255).div_(value.clamp_min(1)).floor_().div_(255).mul_(value)
    turned = torch.empty_like(x)
    for channel, offset in enumerate((5.0, 3.0, 1.0)):
        place = hue + offset
        place.sub_((place / 6).floor_(), alpha=6)
        share = torch.minimum(place, 4 - place).clamp_(0, 1)
        turned[:, channel] = value - share.mul_(drop)  # out= would break the compiled graph
    return turned.add_(0.5).floor_()


# ---- blur. Pillow's GaussianBlur is three passes of a box filter with fractional ends (Gwosdek et al., SSVM 2011),
# about 3 sigma wide to each side; edges are replicated.


def _box_radius(sigma: Tensor) -> Tensor:
    variance = (sigma if sigma.device.type == "mps" else sigma.double()) ** 2 / 3  # which has no float64
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return whole + fraction


def _box(radius: Tensor, distance: Tensor) -> Tensor:
    return (radius + 1 - distance).clamp(0, 1) / (2 * radius + 1)


def _blur_image(x: Tensor, sigma: float) -> Tensor:
    """float32 [3, H, W]: each pass is a few sums of shifted images, rounded as in Pillow."""
    radius = _box_radius(torch.tensor(sigma))
    reach = int(radius) + 1
    weights = _box(radius, torch.arange(reach + 1)).tolist()
    for side in (2, 2, 2, 1, 1, 1):
        size = x.shape[side]
        padded = F.pad(x[None], (reach, reach, 0, 0) if side == 2 else (0, 0, reach, reach), mode="replicate")[0]
        x = x * weights[0]
        for i in range(1, reach + 1):
            pair = padded.narrow(side, reach - i, size) + padded.narrow(side, reach + i, size)
            x.add_(pair, alpha=weights[i])
        x = x.add_(0.5).floor_()
    return x


def _blur_batch(x: Tensor, sigma: Tensor) -> Tensor:
    """float32 [b, 3, S, S], sigma [b, 1, 1], 0 for no blur. Each pass is a product with one matrix per image, which
    includes the edges.

    The passes are separate, because Pillow rounds after each; one product for all three would be up to 1.3 of 255 off
    on average.
    """
    size = x.shape[-1]
    place = torch.arange(size, device=x.device)
    radius = _box_radius(sigma)
    box = _box(radius, (place[:, None] - place).abs())  # [b, S, S]
    # The edge pixel gets the weight of all positions beyond the image: the sum of the box's tail.
    beyond = torch.arange(1, size + 1, device=x.device)
    tails = _box(radius, beyond).flip(-1).cumsum(-1).flip(-1)[:, 0]  # [b, S], sum over distances > row number
    box[:, :, 0] += tails
    box[:, :, -1] += tails.flip(-1)
    box = box.float()[:, None]
    for _ in range(3):
        x = (x @ box.mT).add_(0.5).floor_()
    for _ in range(3):
        x = (box @ x).add_(0.5).floor_()
    return x
