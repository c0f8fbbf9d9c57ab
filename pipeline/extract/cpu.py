"""The convolution stack and what is kept of its maps; the home of torch, with `device`."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d

from pipeline.extract import kernel
from pipeline.extract.activations import ACTIVATIONS
from pipeline.extract.compiled import CompiledExtractor
from pipeline.extract.keeping import buffer, pool, quantise_into
from pipeline.extract.layers import Array, block_shape, padded_extent
from pipeline.extract.stack import AS_FLOAT32, ImageByImage, Pooled, Stack, check_range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pipeline.config import Activation, ExtractorSpec, LayerSpec
    from pipeline.extract.quantise import StoredOutput

Precision = Literal["float32", "float64"]

BAND_OUTPUTS = 1 << 20  # convolve about a million outputs, of as many inputs, at a time: scratch does not grow with the image
BAND_VALUES = 1 << 16  # un-shuffle about 256 KiB at a time, which stay in a core's cache
IMAGE_CHANNELS = 4  # to turn so few takes little time
UNFOLDED_VALUES = 1 << 24  # 128 MiB in float64


def use_one_thread() -> None:
    """Let each of torch's calls in this process use one core; images are what runs in parallel."""
    torch.set_num_threads(1)


def _activate(values: Tensor, activation: Activation) -> Tensor:
    """Apply an activation in place."""
    method = ACTIVATIONS[activation].in_place
    return values if method is None else getattr(values, method)()


class Layer(nn.Module):
    """Valid convolution, max-pool, bias, activation.

    Without a destination, ``forward`` says it in torch's words. With one it computes the same on a CPU, faster where filters are few:
    a block of sy x sx neighbouring outputs is sy*sx*filters output channels of one convolution of stride (sy, sx), whose kernels are
    the layer's, moved by (dy, dx) within (kh + sy - 1, kw + sx - 1) zeros. Channels are last, as torch's convolution is faster so,
    unless input and destination have them first: turning the maps would then take longer than that saves.
    """

    weight: Tensor
    bias: Tensor
    block_weight: Tensor
    block_bias: Tensor

    def __init__(self, spec: LayerSpec, weight: Tensor, bias: Tensor, unit: float) -> None:
        super().__init__()
        self.spec, self.block = spec, block_shape(spec.filters, spec.kernel)
        (kh, kw), (sy, sx) = spec.kernel, self.block
        blocks = weight.new_zeros(sy, sx, spec.filters, weight.shape[1], kh + sy - 1, kw + sx - 1)
        for dy in range(sy):
            for dx in range(sx):
                blocks[dy, dx, :, :, dy : dy + kh, dx : dx + kw] = weight * unit  # exact: the unit is a power of two
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("block_weight", blocks.flatten(0, 2).contiguous(memory_format=torch.channels_last))
        self.register_buffer("block_bias", bias.repeat(sy * sx))
        self.planar_weight = weight if unit == 1 else weight * unit

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute (channel, y, x) -> (filters, y, x), or ``out``, which is float32; any strides will do."""
        if out is not None:
            return self._blocked(x, out)
        x = _convolve(x, self.weight.to(x.dtype))
        if self.spec.pool != (1, 1):
            x = max_pool2d(x, self.spec.pool)
        return _activate(x + self.bias[:, None, None], self.spec.activation)

    def _blocked(self, x: Tensor, out: Tensor) -> Tensor:
        (kh, kw), (sy, sx), (py, _) = self.spec.kernel, self.block, self.spec.pool
        height, width = x.shape[1] - kh + 1, x.shape[2] - kw + 1
        columns = padded_extent(width, sx)
        band = max(1, BAND_OUTPUTS // (max(self.spec.filters, x.shape[0]) * columns * sy * py)) * sy * py
        is_planar = self._stays_planar(x, out)
        weight = self.planar_weight if is_planar else self.block_weight
        for top in range(0, out.shape[1] * py, band):
            rows = min(band, height - top)
            shape = (x.shape[0], padded_extent(rows, sy) + kh - 1, columns + kw - 1)
            padded = _padded(x[:, top : top + rows + kh - 1], shape, is_planar=is_planar)
            y = conv2d(padded, weight, self.block_bias, stride=self.block)  # (1, sy*sx*filters, rows/sy, columns/sx)
            part = out[:, top // py : (top + rows) // py]
            if self.spec.pool == (1, 1):
                _unshuffle(_activate(y, self.spec.activation), self.block, part)
            else:
                pooled = _max_pool(
                    _join(y, self.block), self.spec.pool, (part.shape[1], part.shape[2])
                )  # max(x) + bias = max(x + bias)
                part.copy_(_activate(pooled, self.spec.activation).permute(2, 0, 1))
        return out

    def _stays_planar(self, x: Tensor, out: Tensor) -> bool:
        """Whether channels are first throughout: the destination has them so, and so does the input, or it is an image."""
        is_simple = self.block == (1, 1) == self.spec.pool
        return is_simple and out.stride(2) == 1 and (x.stride(2) == 1 or x.shape[0] <= IMAGE_CHANNELS)


def _maps_buffer(role: str, shape: tuple[int, int, int], *, is_planar: bool) -> Tensor:
    """Scratch for maps (filters, y, x), stored in this order or else channels last."""
    filters, height, width = shape
    return buffer(role, *shape) if is_planar else buffer(role, height, width, filters).permute(2, 0, 1)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve in torch's words, on a CPU in bands: there it unfolds its input, which for 16 megapixels took 31 GB."""
    height = x.shape[-2] - weight.shape[-2] + 1
    band = max(1, UNFOLDED_VALUES // (weight[0].numel() * x.shape[-1]))
    if x.device.type != "cpu" or height <= band:
        return conv2d(x, weight)
    bands = (x[..., top : min(top + band, height) + weight.shape[-2] - 1, :] for top in range(0, height, band))
    return torch.cat([conv2d(part, weight) for part in bands], dim=-2)


def _padded(x: Tensor, shape: tuple[int, int, int], *, is_planar: bool) -> Tensor:
    """Copy (channel, y, x) to float32 scratch (1, *shape), with zeros below and right."""
    padded = _maps_buffer("input", shape, is_planar=is_planar)
    padded[:, : x.shape[1], : x.shape[2]].copy_(x)
    padded[:, : x.shape[1], x.shape[2] :].zero_()
    padded[:, x.shape[1] :].zero_()
    return padded[None]


def _join(y: Tensor, block: tuple[int, int]) -> Tensor:
    """Put blocks (1, sy*sx*filters, rows, columns) together: (y, x, filters), a view of ``y`` where sy is 1."""
    (sy, sx), (rows, columns) = block, y.shape[2:]
    y = torch.unflatten(y[0].permute(1, 2, 0), 2, (sy, sx, -1))  # (rows, columns, sy, sx, filters)
    return y.transpose(1, 2).reshape(rows * sy, columns * sx, -1)


def _max_pool(y: Tensor, pool: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Max-pool (y, x, filters); torch's own takes ten times as long where it misses that filters are last."""
    (py, px), (height, width) = pool, size
    y = reduce(torch.maximum, [y[i : height * py : py] for i in range(py)])
    columns = [y[:, i : width * px : px] for i in range(px)]
    return torch.maximum(reduce(torch.maximum, columns[:-1] or columns), columns[-1])


def _unshuffle(y: Tensor, block: tuple[int, int], out: Tensor) -> Tensor:
    """Spread (1, sy*sx*filters, rows, columns) over ``out`` (filters, y, x); what lies beyond ``out`` is dropped."""
    (sy, sx), (filters, height, width) = block, out.shape
    if out.stride(0) == 1 and sy == 1:  # channels last, as y is
        return out.copy_(_join(y, block)[:height, :width].permute(2, 0, 1))
    y = y.view(sy, sx, filters, *y.shape[2:]).permute(2, 3, 0, 4, 1)  # (filters, rows, sy, columns, sx)
    (rows, rest_y), (columns, rest_x) = divmod(height, sy), divmod(width, sx)
    band = max(1, BAND_VALUES // (filters * sy * sx * y.shape[3]))
    for top in range(0, rows, band):
        bottom = min(rows, top + band)
        _place(y[:, top:bottom], torch.unflatten(out[:, top * sy : bottom * sy], 1, (bottom - top, sy)), columns, rest_x)
    if rest_y:
        _place(y[:, rows, :rest_y], out[:, rows * sy :], columns, rest_x)
    return out


def _place(y: Tensor, out: Tensor, columns: int, rest: int) -> None:
    """Copy (..., columns, sx) to (..., x): the whole blocks, then what the last one holds of the strip at the right."""
    whole = columns * y.shape[-1]
    if columns:
        torch.unflatten(out[..., :whole], -1, (columns, y.shape[-1])).copy_(y[..., :columns, :])
    if rest:
        out[..., whole:].copy_(y[..., columns, :rest])


class Extractor(ImageByImage, nn.Module):
    """The stack of layers, with weights, on a device.

    Parameters
    ----------
    spec : ExtractorSpec
    weights : dict of str to (filters, channel, y, x) and (filters,)
        Cross-correlation orientation, as `load_weights` gives them.
    stored : iterable of StoredOutput
        How each of the outputs is stored; float32 where nothing is said.
    precision : str
        "float32", or "float64" as a reference.
    device : str
        A torch device. On a CPU, float32 takes the blocked convolution; all else torch's own.
    """

    def __init__(
        self,
        spec: ExtractorSpec,
        weights: Mapping[str, Array],
        stored: Iterable[StoredOutput] = (),
        *,
        precision: Precision = "float32",
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.compiled = CompiledExtractor(spec, weights, stored)
        self.stack: Stack = self.compiled.stack
        dtype = torch.float64 if precision == "float64" else torch.float32
        tensors = {name: torch.from_numpy(np.array(values)).to(dtype) for name, values in weights.items()}
        self.layers = nn.ModuleList(
            Layer(layer, tensors[f"{name}_weight"], tensors[f"{name}_bias"], 1 / 256 if name == "conv1" else 1.0)
            for name, layer in zip(self.stack.names, self.stack.layers, strict=True)
        )
        self.dtype, self.device = dtype, torch.device(device)
        self.is_plain = dtype == torch.float32 and self.device.type == "cpu"
        self.to(self.device)
        if self.device.type == "cuda":
            self.set_precision()

    @torch.inference_mode()
    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Compute the maps of one image.

        Parameters
        ----------
        image : (y, x, channel) uint8, or float of the same range 0 ... 255

        Returns
        -------
        dict of str to (channel, y, x)
            The layers of ``spec.output_names``, in the extractor's precision.

        Raises
        ------
        ImageError
            When the image is too small for the layers (code ``too_small``).
        """
        return {name: maps.clone() for name, maps in self._maps(image, {}) if name in self.stack.stored}

    @torch.inference_mode()
    def reference(self, image: Array) -> dict[str, Array]:
        """Compute the float64 maps (channel, y, x) of one uint8 image (y, x, channel), by torch's own convolution."""
        maps = self._plain(pixels(image), torch.float64)
        return {name: values.cpu().numpy() for name, values in maps if name in self.stack.stored}

    def version(self, size: tuple[int, ...], most: tuple[int, int] | None = None) -> str:  # noqa: ARG002 (as of `MapExtractor`)
        """What computes the first layer of an image of a size, for the receipt; see `kernel.version`."""
        return self.compiled.version(size) if self.compiled.takes(size) or self._is_first_compiled else "torch"

    @property
    def _is_first_compiled(self) -> bool:
        """Whether compiled code computes the first layer, where it can and is faster: a function of the layers alone."""
        is_fast = kernel.is_fast(self.stack.layers[0])
        return (is_fast or len(self.layers) == 1) and self.compiled.layer.can_store(AS_FLOAT32)

    def set_precision(self) -> None:
        """Set cuDNN's switches, which are those of the process: full float32 unless TF32 was asked for, and no choice by timing."""
        torch.backends.cudnn.allow_tf32 = self.stack.spec.tf32
        torch.backends.cudnn.deterministic = True

    @torch.inference_mode()
    def extract_into(self, image: Array, out: Mapping[str, Array]) -> dict[str, Pooled]:
        """Compute the maps of one image and store them; thread-safe, and a function of the image alone.

        Parameters
        ----------
        image : (y, x, channel) uint8
            A read-only or strided array is copied first.
        out : mapping of str to (channel, y, x)
            Per output whose maps are kept, where they go: the image's valid extent, of any strides, in the dtype it is stored as.

        Returns
        -------
        dict of str to Pooled
            Statistics of every output, of the float32 values before they are rounded for storage.

        Raises
        ------
        ImageError
            When the image is too small for the layers (code ``too_small``).
        FeaturemapsError
            When a map holds NaN, infinity or values beyond what its dtype was chosen for.
        """
        if self.is_plain and self.compiled.takes(image.shape[:2]):
            return self.compiled.extract_into(image, out)
        self.stack.check(image, out)
        stored_as = self.stack.stored
        is_direct = {name: stored_as[name].dtype == "float32" and to.strides[2] == to.itemsize for name, to in out.items()}
        direct = {name: torch.from_numpy(to) for name, to in out.items() if is_direct[name]}
        pooled = {}
        for name, values in self._maps(pixels(image), direct):
            if name in stored_as:
                maps = values.float().cpu()  # themselves, where they are that
                pooled[name] = Pooled(*pool(maps).numpy())
                check_range(name, pooled[name], stored_as[name])
                if name in out and maps is not direct.get(name):
                    quantise_into(maps, stored_as[name], out[name])
        return pooled

    def _maps(self, image: Tensor, out: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Layer after layer, its maps: in ``out``, or else only until the next is asked for."""
        if not self.is_plain:
            yield from self._plain(image, self.dtype)
            return
        x = image.permute(2, 0, 1)  # (channel, y, x); 1/256 is in the weights
        for i, (layer, (name, shape)) in enumerate(zip(self.layers, self.stack.shapes(*image.shape).items(), strict=True)):
            is_compiled = i == 0 and image.dtype == torch.uint8 and self._is_first_compiled
            is_planar = is_compiled or name in self.stack.stored  # else as the next layer takes it
            # The other buffer holds the layer's input.
            maps = out[name] if name in out else _maps_buffer(f"maps{i % 2}", shape, is_planar=is_planar)
            if is_compiled and maps.stride(2) == 1:
                self.compiled.layer.compute(image.numpy(), AS_FLOAT32, maps.numpy())
                x = maps
            else:
                x = layer(x, maps)
            yield name, x

    def _plain(self, image: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Layer after layer, its maps, by torch's own convolution."""
        x = image.to(self.device, dtype).permute(2, 0, 1) / 256
        for layer, name in zip(self.layers, self.stack.shapes(*image.shape), strict=True):
            x = layer(x)
            yield name, x


def pixels(image: Array) -> Tensor:
    """View an image as a tensor; a strided or read-only one is copied, because torch refuses the one and warns of the other."""
    return torch.from_numpy(np.require(image, requirements=["C", "W"]))
