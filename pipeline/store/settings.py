"""Derives from a job's settings the spec that its store keeps and that every later run is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import POOLED, DecodeSpec, ExtractorSpec, Job
from pipeline.extract import compiled_stack, kernel
from pipeline.extract.layers import Array, layer_names, output_bounds, output_sizes, receptive_field
from pipeline.extract.quantise import RANGE_MARGIN, TF32_MARGIN, quantisation
from pipeline.extract.weights import weights_digest
from pipeline.source.exclusion import DEFAULT_EXCLUDE
from pipeline.source.identity import absolute_source
from pipeline.store.layout import ClassLayout, Size, class_layout, image_cost_s
from pipeline.store.schema import StoredLayer, StoreSpec, with_digest

DECODER = "pillow"
VERSION = version("featuremaps")


def store_spec(job: Job, root: str, weights: dict[str, Array]) -> StoreSpec:
    """The spec of the store that a job makes.

    Parameters
    ----------
    job : Job
    root : str
        Source root, absolute.
    weights : dict of str to float32 array
    """
    return StoreSpec(
        source=absolute_source(job.source),
        source_root=root,
        dtype=job.dtype,
        extractor=_extractor_content(job.extractor, job.decode.channels, weights),
        decode=with_digest({**job.decode.model_dump(mode="json"), "decoder": DECODER}),
        layers=_stored_layers(job.extractor, job.dtype, weights),
        created_version=VERSION,
        written_version=VERSION,
        excluded=DEFAULT_EXCLUDE if job.default_exclude else (),
    )


def _stored_layers(spec: ExtractorSpec, dtype: str, weights: dict[str, Array]) -> tuple[StoredLayer, ...]:
    names = layer_names(spec.layers)
    bounds = dict(zip(names, output_bounds(spec.layers, weights), strict=True))
    filters = dict(zip(names, (layer.filters for layer in spec.layers), strict=True))
    layers = []
    for name in spec.output_names:
        has_maps = name in spec.map_names
        stored_dtype = dtype if has_maps else "float32"  # pooled values are stored as computed
        q = quantisation(bounds[name], stored_dtype, TF32_MARGIN if spec.tf32 else RANGE_MARGIN)
        layers.append(
            StoredLayer(name, filters[name], q.dtype, q.scale_factor, q.add_offset, q.fill_value, q.error_bound, has_maps)
        )
    return tuple(layers)


def check_spec(spec: StoreSpec, weights: dict[str, Array]) -> Iterator[str]:
    """Contradictions between a store's root metadata and its digests or its weights."""
    for name, content in (("extractor", spec.extractor), ("decode", spec.decode)):
        covered = {key: value for key, value in content.items() if key not in {"sha256", "origin"}}
        if with_digest(covered)["sha256"] != content["sha256"]:
            yield f"the settings under {name} do not fit their sha256"
            return
    if weights_digest(weights) != spec.extractor.get("weights_sha256"):
        yield "the weights under extractor/ do not fit their sha256"
    elif repr(_stored_layers(extractor_spec(spec), spec.dtype, weights)) != repr(spec.layers):
        yield "how layers are stored (scale_factor, add_offset, error_bound) does not follow from the weights"


def _extractor_content(spec: ExtractorSpec, channels: int, weights: dict[str, Array]) -> dict[str, Any]:
    content = with_digest(
        {
            "layers": [layer.model_dump(mode="json") for layer in spec.layers],
            "outputs": [*spec.map_names, *([POOLED] if POOLED in spec.outputs else [])],
            "channels": channels,
            "weights_sha256": weights_digest(weights),
            # Further settings only if they are not the default: so a new setting leaves older stores as they are.
            **spec.model_dump(mode="json", exclude={"layers", "seed", "weights", "outputs"}, exclude_defaults=True),
        }
    )
    origin = {"seed": spec.seed} if spec.weights is None else {"weights": Path(spec.weights).name}
    return content | {"origin": origin}


def decode_spec(spec: StoreSpec) -> DecodeSpec:
    """The decode rules of a store."""
    return DecodeSpec(**{key: value for key, value in spec.decode.items() if key not in {"decoder", "sha256"}})


def extractor_spec(spec: StoreSpec) -> ExtractorSpec:
    """The layers of a store; their weights are in the store, whatever file they came from."""
    content = spec.extractor
    further = content.keys() & (ExtractorSpec.model_fields.keys() - {"layers", "outputs"})
    return ExtractorSpec(layers=content["layers"], outputs=tuple(content["outputs"]), **{key: content[key] for key in further})


def needed_size(spec: ExtractorSpec) -> Size:
    """Smallest input height and width that leave a value in every layer."""
    field = receptive_field(spec.layers)
    return field.height, field.width


def layout_of(size: Size, job_spec: ExtractorSpec, dtype_bytes: int, channels: int) -> ClassLayout:
    """Layout of a shape class for an extractor."""
    names = layer_names(job_spec.layers)
    sizes = dict(zip(names, output_sizes(job_spec.layers, *size), strict=True))
    filters = dict(zip(names, (layer.filters for layer in job_spec.layers), strict=True))
    layers = [(name, filters[name], sizes[name]) for name in job_spec.map_names]
    return class_layout(size, layers, dtype_bytes, channels)


def cost_s(spec: ExtractorSpec, layout: ClassLayout, channels: int) -> float:
    """`image_cost_s` for an image of the class's full size."""
    return image_cost_s(layout, multiply_adds(spec, layout.size, channels), torch_values(spec, layout.size, channels))


class Scratch(NamedTuple):
    """Memory that a worker's thread needs to compute an image, beside its maps as they are stored."""

    n_bytes: int = 0
    has_torch: bool = False
    """Whether torch computes any layer."""


def scratch_of(spec: ExtractorSpec, dtype: str, size: Size, channels: int, *, has_kernel: bool = True) -> Scratch:
    """Memory for one image's float32 maps that are not stored: with torch, those of two neighbouring layers.

    Compiled code that computes the only layer writes its maps to where they are stored. ``has_kernel`` says whether workers have
    compiled code.
    """
    if has_kernel and is_compiled(spec, dtype, channels, size):
        is_direct = _is_first_layer(spec) and bool(spec.map_names)
        return Scratch(0 if is_direct else compiled_stack.scratch_bytes(spec.layers, *size, channels))
    sizes = output_sizes(spec.layers, *size)
    maps = [4 * layer.filters * math.prod(out) for layer, out in zip(spec.layers, sizes, strict=True)]
    return Scratch(max(a + b for a, b in pairwise([0, *maps])), has_torch=True)


def is_compiled(spec: ExtractorSpec, dtype: str, channels: int, size: Size | None = None) -> bool:
    """Whether compiled code computes the whole extractor on this kind of machine, so that torch is not needed.

    Of images of ``size``; without it, of images of any size.
    """
    if kernel.version(channels) == "torch" or dtype not in kernel.DTYPES or not compiled_stack.has_activations(spec.layers):
        return False
    is_small = size is not None and compiled_stack.is_small(spec.layers, *size)
    return is_small or _is_first_layer(spec) or compiled_stack.pays(spec.layers, channels)


def _is_first_layer(spec: ExtractorSpec) -> bool:
    """Whether all of the stack is what compiled code has as a first layer."""
    return len(spec.layers) == 1 and kernel.has(spec.layers[0])


def torch_values(spec: ExtractorSpec, size: Size, channels: int) -> int:
    """Values, before pooling, of one image's layers, without those that compiled code computes."""
    if compiled_stack.pays(spec.layers, channels):
        return 0
    sizes = output_sizes(spec.layers, *size)
    values = [layer.filters * math.prod(layer.pool) * math.prod(out) for layer, out in zip(spec.layers, sizes, strict=True)]
    return sum(values[1:] if kernel.has(spec.layers[0]) else values)


def multiply_adds(spec: ExtractorSpec, size: Size, channels: int) -> int:
    """Multiplications and additions of one image's convolutions."""
    total, inputs = 0, channels
    height, width = size
    for layer, (out_height, out_width) in zip(spec.layers, output_sizes(spec.layers, height, width), strict=True):
        positions = out_height * layer.pool[0] * out_width * layer.pool[1]
        total += layer.filters * inputs * layer.kernel[0] * layer.kernel[1] * positions
        inputs = layer.filters
    return total
