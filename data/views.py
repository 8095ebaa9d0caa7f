"""Making a view's pixels from its parameters: with Pillow (the reference), with torch on the host, or batched on a
device."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from data.augment import BRIGHTNESS, CONTRAST, GREY, HUE, JITTER_ORDERS, ORDER, SATURATION, SIGMA, SOLARIZE
from runtime.device import send


def pil_view(image: Image.Image, box: np.ndarray, flip: bool, colour: np.ndarray, size: int) -> Tensor:
    """The complete view with Pillow, by the same operations as the original code's torchvision transforms. The faster
    implementations are tested against it.

    box: (top, left, height, width). colour: float32 [8], data.augment.COLOUR. Returns uint8 [3, size, size].
    """
    top, left, height, width = (int(x) for x in box)
    image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    image = pil_colour(image, colour)
    return TF.pil_to_tensor(ImageOps.mirror(image) if flip else image)


def pil_colour(image: Image.Image, colour: np.ndarray) -> Image.Image:
    """Apply colour parameters, float32 [8], to an RGB image with Pillow."""
    adjust = {BRIGHTNESS: TF.adjust_brightness, CONTRAST: TF.adjust_contrast, SATURATION: TF.adjust_saturation,
              HUE: TF.adjust_hue}
    value = colour.tolist()
    if value[GREY] == 1:
        image = TF.rgb_to_grayscale(image, 3)
    if value[ORDER] >= 0:
        for column in JITTER_ORDERS[int(value[ORDER])]:
            image = adjust[column](image, value[column])
    if value[GREY] == 2:
        image = TF.rgb_to_grayscale(image, 3)
    if value[SIGMA] > 0:
        image = image.filter(ImageFilter.GaussianBlur(value[SIGMA]))
    return ImageOps.solarize(image, int(value[SOLARIZE])) if value[SOLARIZE] < 256 else image


def fast_crop(pixels: Tensor, box: np.ndarray, flip: bool, out: Tensor) -> None:
    """Crop, resize (antialiased, bilinear) and flip uint8 [3, H, W], and write the result into out, uint8 [3, S, S].

    It calls torch.nn.functional, because torchvision's resize takes half as long again to reach the same kernel, with
    channels last, the layout that the kernel is optimised for.
    """
    top, left, height, width = box.tolist()
    crop = pixels[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    view = F.interpolate(crop, out.shape[1:], mode="bilinear", antialias=True)[0]
    out.copy_(view.flip(-1) if flip else view)


def batched_crop(images: Tensor, boxes: np.ndarray, flip: np.ndarray, size: int) -> Tensor:
    """The same for a batch of images of one size on their device: uint8 [b, 3, H, W] -> uint8 [b, 3, S, S].

    Antialiased resizing is a product with one matrix for each side, so each image can have its own crop:
    out = rows @ image @ columns^T. The filter is Pillow's, with its rounding between the two products. Pillow 13 starts
    with the cheaper side, this always with the columns, so pixels differ by at most 2 of 255, 0.1 on average.
    """
    height, width = images.shape[-2:]
    boxes, flip = (send(torch.from_numpy(x), images.device) for x in (boxes, flip))
    columns = _resampling(boxes[:, 1], boxes[:, 3], width, size)  # [b, S, W]
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    rows = _resampling(boxes[:, 0], boxes[:, 2], height, size)  # [b, S, H]
    wide = (images.float() @ columns.mT[:, None]).add_(0.5).floor_()  # [b, 3, H, S]
    return (rows[:, None] @ wide).add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)


def _resampling(start: Tensor, length: Tensor, whole: int, size: int) -> Tensor:
    """float32 [b, size, whole]: row i holds the weights of output pixel i over the `whole` input pixels of a side.

    Input pixels outside [start, start + length) get weight 0. The filter is a triangle of the width of an output pixel,
    but of at least one input pixel.
    """
    scale = (length.double() / size)[:, None, None]
    reach = scale.clamp_min(1)
    output = torch.arange(size, device=start.device)[None, :, None]
    place = torch.arange(whole, device=start.device)[None, None] - start[:, None, None]
    weights = (1 - (place + 0.5 - (output + 0.5) * scale).abs() / reach).clamp_min(0)
    weights = weights * ((place >= 0) & (place < length[:, None, None]))
    return (weights / weights.sum(2, keepdim=True)).float()
