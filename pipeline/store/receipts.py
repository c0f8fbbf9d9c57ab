"""Reads and writes the receipts of runs in a store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from itertools import islice
from typing import Any

from pipeline.errors import FeaturemapsError
from pipeline.store.objects import Place, children, put_json, read_json
from pipeline.store.run_ids import run_order
from pipeline.store.schema import RUNS


def receipt_ids(store: Place) -> list[str]:
    """Names of the runs that left a receipt, oldest first, independent of clocks; works before the store is complete."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        names = children(store / RUNS)
    return sorted((name.removesuffix(".json") for name in names if fnmatch(name, "*Z-*.json")), key=run_order)


def each_receipt(store: Place) -> Iterator[dict[str, Any]]:
    """Receipts, newest first, each read when it is asked for; skips those that a power cut left empty."""
    for run_id in reversed(receipt_ids(store)):
        with contextlib.suppress(FeaturemapsError):
            yield read_json(store / RUNS / f"{run_id}.json")


def read_receipts(store: Place, n: int | None = None) -> list[dict[str, Any]]:
    """The newest ``n`` receipts, or all, newest first."""
    return list(islice(each_receipt(store), n))


def last_work(store: Place) -> dict[str, Any]:
    """The newest receipt of a run that was not refused before it began; empty if there is none."""
    return next((receipt for receipt in each_receipt(store) if not receipt.get("is_refusal")), {})


def write_receipt(store: Place, run_id: str, receipt: Mapping[str, Any], *, durable: bool) -> None:
    """Write a run's receipt to ``runs/``."""
    put_json(store / RUNS / f"{run_id}.json", receipt, indent=1, durable=durable)
