"""Weights, drawn from a seed or read from a file; no torch."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from safetensors import SafetensorError, deserialize

from pipeline.errors import UsageError
from pipeline.extract.layers import Array, weight_shapes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pipeline.config import ExtractorSpec

Weights: TypeAlias = dict[str, Array]

MAX_WEIGHTS = 1 << 27
SAFETENSORS_FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}


def seeded_weights(spec: ExtractorSpec, channels: int, dtype: str = "float32") -> Weights:
    """Draw the weights of a seed: layer by layer, first the kernels, uniform in +-1/sqrt(fan in), then the biases, in +-0.5.

    The draw is that of the Theano deep learning tutorial, whose convolution flips its kernels; here they are returned flipped
    in y and x, ready for a cross-correlation.

    Returns
    -------
    dict of str to (filters, channel, y, x) and (filters,)
        Named as by `weight_shapes`; drawn in float64, then rounded to ``dtype``.
    """
    rng = np.random.RandomState(spec.seed)  # the golden values were drawn with it
    weights: Weights = {}
    for name, shape in weight_shapes(spec.layers, channels).items():
        limit = 1 / np.sqrt(math.prod(shape[1:])) if name.endswith("_weight") else 0.5
        values = rng.uniform(-limit, limit, shape)
        flipped = values[:, :, ::-1, ::-1] if values.ndim == 4 else values
        weights[name] = np.ascontiguousarray(flipped, dtype)
    return weights


def load_weights(spec: ExtractorSpec, channels: int) -> Weights:
    """Weights of an extractor, from its safetensors file or else its seed, as float32 in cross-correlation orientation.

    The file holds ``convN.weight`` (filters, channel, y, x) and ``convN.bias`` (filters,), or ``convN_weight`` and
    ``convN_bias``, in PyTorch's orientation, as bfloat16, float16, float32 or float64.

    Raises
    ------
    UsageError
        When the file cannot be read, or does not hold exactly the finite floats that the layers need.
    """
    n_weights = sum(map(math.prod, weight_shapes(spec.layers, channels).values()))
    if n_weights > MAX_WEIGHTS:
        raise UsageError(
            f"layers have {n_weights:,} weights, and more than {MAX_WEIGHTS:,} are surely a slip of the pen: nothing was started; use "
            "fewer filters or smaller kernels"
        )
    if spec.weights is None:
        return seeded_weights(spec, channels)
    where = f"weights file {spec.weights}"
    try:
        content = dict(deserialize(Path(spec.weights).read_bytes()))  # type: ignore[no-untyped-call]
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(
            f"{where} cannot be read as safetensors ({error}), so there is no extractor and nothing was started; "
            "give an existing file written by safetensors.torch.save_file, or leave `weights` out to draw them from `seed`"
        ) from error
    shapes = weight_shapes(spec.layers, channels)
    keys = _match_keys(shapes, list(content), where)
    return {name: _read_tensor(content[keys[name]], shape, f"{keys[name]!r} of {where}") for name, shape in shapes.items()}


def _match_keys(names: Iterable[str], keys: list[str], where: str) -> dict[str, str]:
    """Find the file's key of every weight; nothing may be missing or left over."""
    found = {name: key for name in names for key in (name, name.replace("_", ".")) if key in keys}
    missing = [name.replace("_", ".") for name in names if name not in found]
    surplus = sorted(set(keys) - set(found.values()))
    if missing or surplus:
        raise UsageError(
            f"{where} holds {sorted(keys)}: {f'{missing} are missing' if missing else 'nothing is missing'} and "
            f"{f'{surplus} belong to no layer' if surplus else 'nothing is left over'}, so file and layers describe different "
            f"extractors; change `layers`, or save exactly {[name.replace('_', '.') for name in names]}"
        )
    return found


def _read_tensor(entry: Mapping[str, Any], shape: tuple[int, ...], what: str) -> Array:
    """One tensor of the file as float32, once its type, shape and values are known to be right."""
    if entry["dtype"] not in SAFETENSORS_FLOATS:
        raise UsageError(
            f"{what} is of type {entry['dtype']}, but weights are floats ({', '.join(SAFETENSORS_FLOATS)}), so their meaning is "
            "unknown and nothing was started; convert it, for instance with tensor.float(), and save the file again"
        )
    if tuple(entry["shape"]) != shape:
        raise UsageError(
            f"{what} has shape {tuple(entry['shape'])}, but the layers need {shape} (filters, input channels, kernel height, "
            "kernel width; a bias: filters), so it would compute something else; change `filters` or `kernel` of that layer or "
            "the one before it, or `color` of the images (rgb: 3 channels, grey: 1), or give another file"
        )
    raw = np.frombuffer(entry["data"], SAFETENSORS_FLOATS[entry["dtype"]])
    if entry["dtype"] == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)  # bfloat16 is the upper half of a float32
    with np.errstate(over="ignore"):
        values = raw.astype(np.float32).reshape(shape)
    if not np.isfinite(values).all():
        raise UsageError(
            f"{what} holds {np.count_nonzero(~np.isfinite(values))} values that are not finite as float32, so every map would be "
            "NaN or infinite; save weights of a training that converged"
        )
    return values


def weights_digest(weights: Mapping[str, Array]) -> str:
    """Sha256 of names, shapes and little-endian float32 values, sorted by name; 64 hex digits."""
    digest = hashlib.sha256()
    for name, values in sorted(weights.items()):
        digest.update(f"{name}{tuple(values.shape)}\n".encode())
        digest.update(np.ascontiguousarray(values, "<f4").data)
    return digest.hexdigest()
