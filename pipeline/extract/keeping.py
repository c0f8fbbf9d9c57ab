"""What is kept of float32 maps: values as they are stored, and statistics over each map. In torch, on any device."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from pipeline.extract.layers import Array
from pipeline.extract.quantise import INTEGER_MAX, StoredAs

CACHED_VALUES = 1 << 18
_scratch = threading.local()


def buffer(role: str, *shape: int) -> Tensor:
    """Float32 scratch of this thread, contents undefined: one buffer per role, which grows to the largest request."""
    size = math.prod(shape)
    flat: Tensor | None = getattr(_scratch, role, None)
    if flat is None or flat.numel() < size:
        with torch.inference_mode(mode=False):  # what is made in that mode cannot be written to outside it
            flat = torch.empty(size)
        setattr(_scratch, role, flat)
    return flat[:size].view(shape)


def quantise(maps: Tensor, q: StoredAs) -> Tensor:
    """Float32 maps, within the bounds that ``q`` was made for, as they are stored; 16 unsigned bits as int32.

    level = (x - offset) / scale + 0.5, cut off. Within the widened bounds it lies in [1.5, max + 0.5], and float32 moves it by less
    than 0.2: |x| is at most 16 ranges, or 2**20 levels, so that rounding the factor, the constant and the product costs at most
    2**-4 each, and the sum far less. So the integer is in 1 ... max without a clamp, and never the fill.
    """
    if q.dtype not in INTEGER_MAX:
        return maps.to(torch.float16) if q.dtype == "float16" else maps
    return _levels(maps, q).to(torch.uint8 if q.dtype == "uint8" else torch.int32)


def quantise_into(maps: Tensor, q: StoredAs, out: Array) -> None:
    """`quantise` float32 maps (channel, y, x) into ``out``, of any strides."""
    n = _channels_at_once(maps)
    for part, to in zip(torch.split(maps, n), torch.split(torch.from_numpy(out), n), strict=True):
        to.copy_(_levels(part, q) if q.dtype in INTEGER_MAX else part)


def _channels_at_once(maps: Tensor) -> int:
    """Channels (..., channel, y, x) whose values stay in a core's cache while several operations read them; on a GPU all."""
    return max(1, CACHED_VALUES // (maps.shape[-2] * maps.shape[-1])) if maps.device.type == "cpu" else maps.shape[-3]


def _levels(maps: Tensor, q: StoredAs) -> Tensor:
    levels = 1 / q.scale_factor
    constant = torch.full((), 0.5 - q.add_offset * levels, device=maps.device)
    return torch.add(constant, maps, alpha=levels, out=_work(maps))


def _work(maps: Tensor) -> Tensor | None:
    """Scratch of this thread for a result of the same shape; None on other devices, which keep their own."""
    return buffer("work", *maps.shape) if maps.device.type == "cpu" and maps.dtype == torch.float32 else None


def pool(maps: Tensor) -> Tensor:
    """Statistics of float32 maps (..., channel, y, x) over y and x: (4, ..., channel), in the order of `stack.Pooled`."""
    parts = torch.split(maps, _channels_at_once(maps), dim=-3)
    if len(parts) > 1:
        return torch.cat([pool(part) for part in parts], dim=-1)
    n = maps.shape[-2] * maps.shape[-1]
    # Rows are summed in float32 and then in float64; two passes, because E[x^2] - E[x]^2 cancels in float32.
    mean = (maps.sum(-1).double().sum(-1) / n).float()
    centred = torch.sub(maps, mean[..., None, None], out=_work(maps))
    std = (torch.linalg.vector_norm(centred, dim=-1).double().square().sum(-1) / n).sqrt().float()
    return torch.stack([mean, std, maps.amin((-2, -1)), maps.amax((-2, -1))])


def pool_batch(maps: Tensor, heights: Tensor, widths: Tensor, *, is_whole: bool) -> Tensor:
    """`pool` of the first rows and columns of each of float32 maps (n, channel, y, x): (n, 4, channel).

    What lies beyond them counts as zero, in sums of the same order: statistics of an image do not depend on the others of its batch.

    Parameters
    ----------
    maps : (n, channel, y, x) float32
    heights, widths : (n,) int64
        How many rows and columns count, on the same device.
    is_whole : bool
        Whether all of them do.
    """
    n = (heights * widths)[:, None].double()
    rows, columns = (torch.arange(size, device=maps.device) for size in maps.shape[-2:])
    within = ((rows < heights[:, None])[:, :, None] & (columns < widths[:, None])[:, None, :])[:, None]

    def only(values: Tensor, beyond: float) -> Tensor:
        return values if is_whole else torch.where(within, values, beyond)

    mean = (only(maps, 0.0).sum(-1).double().sum(-1) / n).float()
    centred = only(maps - mean[..., None, None], 0.0)
    std = (torch.linalg.vector_norm(centred, dim=-1).double().square().sum(-1) / n).sqrt().float()
    lowest, highest = only(maps, math.inf).amin((-2, -1)), only(maps, -math.inf).amax((-2, -1))
    return torch.stack([mean, std, lowest, highest], 1)
