"""Reads and writes the receipts of runs in a store."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from fnmatch import fnmatch
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


def read_receipts(store: Place, n: int | None = None) -> list[dict[str, Any]]:
    """The receipts of the last ``n`` runs, or of all, newest first; skips receipts that a power cut left empty."""
    found = []
    for run_id in receipt_ids(store)[::-1][:n]:
        with contextlib.suppress(FeaturemapsError):
            found.append(read_json(store / RUNS / f"{run_id}.json"))
    return found


def write_receipt(store: Place, run_id: str, receipt: Mapping[str, Any], *, durable: bool) -> None:
    """Write a run's receipt to ``runs/``."""
    put_json(store / RUNS / f"{run_id}.json", receipt, indent=1, durable=durable)
