"""What an analysis is about: images joined with a table of the user's and cut down to some, layers, statistics."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipeline.analysis.tables import Table, nullable
from pipeline.errors import UsageError
from pipeline.extract.layers import Array, layer_names
from pipeline.store.path_index import similar_names, stored_forms
from pipeline.store.schema import LEDGER_COLUMNS, STATISTICS, Status, StoredLayer, StoreSpec
from pipeline.store.settings import extractor_spec

_LOG = logging.getLogger(__name__)


def join(images: Table, table: Table, on: str, layers: Sequence[StoredLayer], where: str) -> tuple[Table, int]:
    """The images with the columns of another table, and how many of them matched.

    Raises
    ------
    UsageError
        When the other table does not fit: no key column, a key twice, names that are taken, nothing that matches.
    """
    table = _with_key(table, on, images, where)
    _check_names([name for name in table.columns if name != on], images, layers, where)
    known = pd.Index(images[on])
    given = table[on]
    if on == "path":
        table = table.assign(path=_as_stored(given, known))
    is_twice = table[on].duplicated()
    if is_twice.any():
        raise UsageError(
            f"the table to be joined has {int(is_twice.sum()):,} lines whose {on!r} was there before, {_some(given[is_twice])} for "
            "instance, so nobody knows which of them an image should get: keep one line per key, for instance with "
            f"table.drop_duplicates({on!r}), or table.groupby({on!r}).first()"
            + ("; a path counts in the form in which `.images` has it" if on == "path" else "")
        )
    is_matched = known.isin(table[on])
    n_matched = int(is_matched.sum())
    if not n_matched:
        raise UsageError(
            f"none of the {len(images):,} images of {where} matches the table to be joined: its {on!r} begins with {_some(table[on])}, "
            f"that of the images with {_some(images[on])}; bring them to one form"
            + (", paths relative to the source root with / between folders" if on == "path" else "")
        )
    n_unused = int((~table[on].isin(known)).sum())
    _LOG.info(
        "%s: %s of %s images matched; %s of %s lines of the table match no image",
        where,
        n_matched,
        len(images),
        n_unused,
        len(table),
    )
    positions = pd.Index(table[on]).get_indexer(known)
    others = table.drop(columns=on).reset_index(drop=True)
    added = nullable(others).reindex(positions) if (positions < 0).any() else others.take(positions)
    return pd.concat([images, added.set_axis(images.index)], axis=1), n_matched


def _with_key(table: Table, on: str, images: Table, where: str) -> Table:
    if not isinstance(table, pd.DataFrame):
        raise UsageError(
            f"a table to be joined is a pandas DataFrame, and this is a {type(table).__name__}: make one, for instance with pandas.read_csv"
        )
    if on not in table.columns and on in table.index.names:
        table = table.reset_index(on)
    if on not in table.columns:
        raise UsageError(
            f"the table to be joined has no column {on!r} to match images by; it has {_some(table.columns, 10)}: give `on=` one that "
            f"{where} has, too, or rename yours, for instance with table.rename(columns={{'file': {on!r}}})"
        )
    if on not in images.columns:
        raise UsageError(
            f"the images of {where} have no column {on!r} to match a table by; they have {_some(images.columns, 20)}: give one of "
            "these as `on=`"
        )
    return table


def _check_names(names: Sequence[Any], images: Table, layers: Sequence[StoredLayer], where: str) -> None:
    other = [name for name in names if not isinstance(name, str)]
    if other:
        raise UsageError(f"columns of a table to be joined need names that are text, and {_some(other)} is none: rename them")
    taken = {*images.columns, *LEDGER_COLUMNS, "image"}
    clash = [name for name in names if name in taken or any(name == la.name or name.startswith(f"{la.name}_") for la in layers)]
    clash += sorted({name for name in names if names.count(name) > 1} - set(clash))
    if clash:
        raise UsageError(
            f"the table to be joined has columns whose names {where} uses itself, or that are there twice: {_some(clash, 10)}; rename "
            f"them, for instance with table.rename(columns={{{clash[0]!r}: 'my_{clash[0]}'}})"
        )


def _as_stored(paths: pd.Series, known: pd.Index) -> list[Any]:
    """Paths in the form in which the store has them, or the first that it might have."""
    names = set(known)
    return [_stored(path, names) if isinstance(path, str | os.PathLike) else path for path in paths]


def _stored(path: str | os.PathLike[str], known: set[str]) -> str:
    if path in known:
        return str(path)
    forms = stored_forms(path)
    return next((form for form in forms if form in known), forms[0])


def _some(values: Any, n: int = 3) -> str:
    """The first few values, as Python writes them."""
    shown = [repr(value) for value in list(values[:n])]
    return ", ".join(shown) + (", ..." if len(values) > n else "")


# -- some of the images ----------------------------------------------------------------------------------------------------------


def select(images: Table, where: Any, columns: dict[str, Any], store: str, n_lines: int) -> Table:
    """The images that a condition holds for, in their order, each with its index: its line among the ``n_lines`` of the whole store.

    Raises
    ------
    UsageError
        When there is no such column, status, class or image, or the condition is of no kind that is understood.
    """
    chosen = np.ones(len(images), bool) if where is None else _mask(images, where, store, n_lines)
    for name, wanted in columns.items():
        if name not in images.columns:
            raise UsageError(
                f"images of {store} have no column {name!r} to be selected by; they have {_some(images.columns, 20)}: give one of "
                "these, or bring it in with `.join(table)`"
            )
        values = list(wanted) if pd.api.types.is_list_like(wanted) else [wanted]
        if name in {"status", "class"}:
            _check_values(name, values, images, store)
        chosen &= images[name].isin(values).to_numpy()
    return images[chosen]


def _check_values(name: str, values: list[Any], images: Table, store: str) -> None:
    known = (
        [status.name.lower() for status in Status if status.is_live] + ["rejected"]
        if name == "status"
        else sorted({*images["class"]} - {""})
    )
    wrong = [value for value in values if value not in known and value]
    if wrong:
        raise UsageError(f"{store} has no images of {name} {_some(wrong)}: give one of {_some(known, 10)}")


def _mask(images: Table, where: Any, store: str, n_lines: int) -> Array:
    if isinstance(where, pd.DataFrame):
        where = where["path"] if "path" in where.columns else where.index
    if isinstance(where, str | os.PathLike):
        where = [where]
    if isinstance(where, pd.Series) and pd.api.types.is_bool_dtype(where):
        return _boolean(images, where, store, n_lines)
    if isinstance(where, np.ndarray) and where.dtype == bool and where.shape == (len(images),):
        return where.copy()
    if not pd.api.types.is_list_like(where):
        raise UsageError(
            f"images cannot be selected by a {type(where).__name__}: give a boolean Series over `.images`, some lines of `.images`, a list "
            'of paths, or columns by name as in select(status="done")'
        )
    return _named(images, list(where), store)


def _boolean(images: Table, where: pd.Series, store: str, n_lines: int) -> Array:
    """Flags by line of the whole store, or by path."""
    index, flags = where.index, where.astype("boolean").fillna(False).to_numpy(bool)
    if pd.api.types.is_integer_dtype(index) and index.is_unique:
        if images.index.isin(index).all() and index.isin(range(n_lines)).all():
            return np.asarray(images.index.isin(index[flags]))
    else:
        known = pd.Index(images["path"])
        if len(where) and index.isin(known).all():  # as of `pooled()`, which only has the images that are done
            return np.asarray(known.isin(index[flags]))
    raise UsageError(
        f"the boolean Series has {len(where):,} lines, and its index is not that of the {len(images):,} images of {store}: make it from "
        "the `.images` or `.pooled()` of this very store, or of one that it was selected from, as in "
        "store.select(store.images['input_width'] > 500)"
    )


def _named(images: Table, paths: list[Any], store: str) -> Array:
    names = images["path"]
    known = set(names)
    forms = [stored_forms(path) if isinstance(path, str | os.PathLike) else () for path in paths]
    found = [next((form for form in of_path if form in known), None) for of_path in forms]
    missing = [path for path, name in zip(paths, found, strict=True) if name is None]
    if missing:
        near = similar_names(str(missing[0]), names.tolist())
        hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
        raise UsageError(
            f"{len(missing):,} of {len(paths):,} paths are not among the images of {store}, the first is {missing[0]!r}: paths are "
            f"relative to the source root, as in `.images`{hint}"
        )
    return names.isin([name for name in found if name is not None]).to_numpy(bool)


# -- layers and statistics -------------------------------------------------------------------------------------------------------


def choose_layers(spec: StoreSpec, names: str | Sequence[str] | None, store: str) -> list[StoredLayer]:
    """The stored layers of some names; all of them where none are given.

    Raises
    ------
    UsageError
        When a layer is not stored.
    """
    stored = {layer.name: layer for layer in spec.layers}
    wanted = list(stored) if names is None else [names] if isinstance(names, str) else list(names)
    if not wanted:
        raise UsageError(
            f"no layer of {store} was chosen: name at least one of {', '.join(stored)}, or leave the layers out for all"
        )
    for name in wanted:
        if name not in stored:
            computed = layer_names(extractor_spec(spec).layers)
            remedy = (
                f"its extractor computes {name}, so a job with `outputs: [{', '.join([*stored, name])}]` and a store of its own keeps it"
                if name in computed
                else f"its extractor computes {', '.join(computed)}, and `outputs` of a job can name only layers that are computed"
            )
            raise UsageError(f"{store} has no layer {name!r}; it has {', '.join(stored)}: {remedy}")
    return [stored[name] for name in dict.fromkeys(wanted)]


def choose_map_layer(spec: StoreSpec, name: str | None, store: str) -> StoredLayer:
    """One layer of which there are maps; the only one where none is given.

    Raises
    ------
    UsageError
        When it is not stored, has no maps, or there are several and none was named.
    """
    with_maps = [layer.name for layer in spec.layers if layer.has_maps]
    if name is None and len(with_maps) > 1:
        raise UsageError(f"{store} has maps of {', '.join(with_maps)}: say of which, for instance layer={with_maps[0]!r}")
    layer = choose_layers(spec, [*with_maps, spec.layers[0].name][0] if name is None else name, store)[0]
    if not layer.has_maps:
        raise UsageError(
            f"{store} keeps pooled values of {layer.name} and no maps of it; it has maps of {', '.join(with_maps) or 'no layer'}: a job "
            f"with `outputs: [{layer.name}]` and a store of its own keeps them"
        )
    return layer


def choose_statistics(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of statistics.

    Raises
    ------
    UsageError
        When there are none, or one that is not stored.
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    if not wanted or set(wanted) - set(STATISTICS):
        raise UsageError(f"statistics {list(wanted)} are not what stores have: give one or some of {', '.join(STATISTICS)}")
    return wanted


def require_number(n: int, what: str) -> None:
    """Raise `UsageError` if ``n`` is not a positive integer.

    Raises
    ------
    UsageError
        When it is not.
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise UsageError(f"{n} {what} were asked for, so there is nothing to look for: give a whole number, 1 or more")
