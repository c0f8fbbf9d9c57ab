"""The classes of a store: creates them, and updates their metadata."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.errors import FeaturemapsError
from pipeline.store.columns import Ledger
from pipeline.store.layout import ClassLayout, class_name
from pipeline.store.objects import Place, each, exists, make_folder, put_json
from pipeline.store.repair import remove_unfinished
from pipeline.store.schema import (
    LEDGER_COLUMNS,
    STATISTICS,
    Columns,
    ShapeClass,
    StoreSpec,
    column_document,
    group_document,
    maps_document,
    pooled_document,
)


def create_class(ledger: Ledger, spec: StoreSpec, layout: ClassLayout, kind: str, columns: Columns) -> ShapeClass:
    """See `Store.create_class`."""
    group = ledger.path / class_name(layout.size)
    if exists(group / "zarr.json"):
        raise FeaturemapsError(
            f"class {group} exists already: creating it again would lose its rows, so nothing was touched; this is an error of "
            "the program, please report it"
        )
    remove_unfinished(group)
    length = len(columns["path"])
    each(
        lambda item: _create_array(group / item[0], item[1], durable=ledger.durable),
        _documents(spec, layout, length).items(),
        group,
    )
    ledger.write(group.name, np.arange(length), columns)
    height, width = layout.size
    attributes = {"shape_class": {"height": height, "width": width, "kind": kind, "shard_rows": layout.shard_rows}}
    put_json(group / "zarr.json", group_document(attributes), durable=ledger.durable)
    return ShapeClass(layout.size, length, layout, kind, attributes)


def _documents(spec: StoreSpec, layout: ClassLayout, length: int) -> dict[str, dict[str, Any]]:
    """Metadata of all arrays of a class, by name."""
    documents = {name: column_document(name, dtype, length) for name, dtype in LEDGER_COLUMNS.items()}
    for layer, stored in zip(layout.layers, spec.map_layers, strict=True):
        documents[layer.name] = maps_document(layout, layer, stored, length)
    for stored in spec.layers:
        documents |= {f"{stored.name}_{statistic}": pooled_document(stored, length) for statistic in STATISTICS}
    return documents


def _create_array(folder: Place, document: dict[str, Any], *, durable: bool) -> None:
    make_folder(folder, durable=durable)
    put_json(folder / "zarr.json", document, durable=durable, only="create")


def mark_padded(store: Place, shape_class: ShapeClass, *, durable: bool) -> ShapeClass:
    """Record that a class now holds images smaller than itself."""
    attributes = dict(shape_class.attributes)
    attributes["shape_class"] = {**attributes["shape_class"], "kind": "padded"}
    put_json(store / shape_class.name / "zarr.json", group_document(attributes), durable=durable)
    return replace(shape_class, kind="padded", attributes=attributes)
