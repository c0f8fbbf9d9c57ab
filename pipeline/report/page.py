"""One self-contained HTML page about a store: what was run on what, how it went, what is in it, and how to open it."""

from __future__ import annotations

import io
import itertools
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pipeline.analysis.feature_store import FeatureStore, open_store
from pipeline.errors import UsageError
from pipeline.extract.layers import ROUNDING, TF32_ROUNDING, receptive_field
from pipeline.report import figures
from pipeline.report.arrays import Histogram
from pipeline.report.facts import LIVE, Facts, as_summary, gather, run_facts, verdict_of
from pipeline.report.html import page
from pipeline.report.samples import MAX_VALUES, Sample, choose, histograms, samples
from pipeline.report.sandbox import Embedded, data_uri, thumbnails
from pipeline.run.summary import receipt
from pipeline.run.summary_text import what_it_did
from pipeline.store.contents import BadImage
from pipeline.store.lock import current_holder
from pipeline.store.objects import Place, put
from pipeline.store.schema import StoredLayer
from pipeline.store.settings import VERSION, decode_spec
from pipeline.store.store import Store
from pipeline.text import count, printable

N_BAD = 200
"""Bad images that are named."""
N_THUMBNAILS = 60
N_CLASSES = 20
N_RUNS = 10
N_HOSTS = 8
THUMBNAIL_PX = 96
SEED = 23455
PICTURE_BYTES = 4 * 1024**2
"""What the pictures of sample images may take, as text."""
PLOT_BYTES = 1024**2
"""What the drawings of filters and of layers' values may take, as text; further layers have none."""
DECODABLE = {"truncated", "corrupt", "too_small"}
"""Codes of bad images of which a decoder may show a part."""
FIGURE_DPI = 110
N_COUNTED = 16
"""Images whose values are counted in histograms, at least."""
T = TypeVar("T", Sample, "Plot")
TONES = {"complete": "good", "at work": "working", "failed": "bad", "refused": "bad", "died": "bad"}
STATUSES = {
    "done": "its maps are in the store",
    "pending": "no run has reached it yet, or the storage failed; the next run computes it",
    "quarantined": "it could not be decoded or extracted",
    "rejected": "its header or its file is unfit, so that it has no row",
}


def write_report(
    store: str | Place | FeatureStore, output: str | Path, *, n_samples: int = 6, n_bad: int = N_BAD, seed: int = SEED
) -> None:
    """Write one HTML page about a store, whole or not at all.

    Works for stores of any state, also one that a run works on, and where the source hangs; takes no lock. The page needs no network, and
    its script only adds to what is there without. Pictures of samples take at most `PICTURE_BYTES` of it and drawings of layers at most
    `PLOT_BYTES`, but for the first of each; the rest is tables, and thumbnails of at most `N_THUMBNAILS` bad images.

    Parameters
    ----------
    store : str, Path, Url or FeatureStore
        Of a selection of images the page is about the whole store.
    output : str or Path
        The page; one that is there is replaced once the new one is complete.
    n_samples : int
        Images that are shown with their maps.
    n_bad : int
        Quarantined and rejected images that are named.
    seed : int
        Of the choice of samples.

    Raises
    ------
    UsageError
        When there is no store, matplotlib is missing, or the page cannot be written where it is wanted.
    FeaturemapsError
        When the store's ledger or its weights are damaged; maps that are damaged are said on the page.

    Examples
    --------
    >>> write_report("features.zarr", "report.html")  # doctest: +SKIP
    """
    output = Path(output)
    _check_output(output)
    features = store if isinstance(store, FeatureStore) else open_store(store)
    content = render(features, n_samples=n_samples, n_bad=n_bad, seed=seed).encode("utf-8", "backslashreplace")
    try:
        put(output, content)
    except OSError as error:
        raise UsageError(f"page {output} cannot be written ({error}): check its folder, permissions and space") from error


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise UsageError(f"page {output} would replace a folder, so nothing was written: give a file in it, such as report.html")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"page {output} would lie in a folder that is not there, so nothing was written: make the folder first")


def render(features: FeatureStore, *, n_samples: int = 6, n_bad: int = N_BAD, seed: int = SEED) -> str:
    """The page as text."""
    plots = list(_filters(features))  # first, as nothing is to be done where matplotlib is missing
    store = Store(features.path)  # as it is now, also while a run works on it
    facts = gather(store, current_holder(features.path), n_bad)
    chosen, too_large = choose(store, max(n_samples, N_COUNTED) if features.map_layers else 0, seed)
    counted = histograms(store, chosen)
    shown, n_left_out = _within_budget(samples(store, chosen, counted, n_samples), PICTURE_BYTES)
    layers = list(_layers(features, shown))
    plots, n_plots_left_out = _within_budget(itertools.chain(plots, _histograms(counted)), PLOT_BYTES)
    values = _about_store(store, facts, shown) | {
        "has_maps": bool(features.map_layers),
        "samples": shown,
        "n_left_out": n_left_out,
        "too_large": too_large,
        "max_values": MAX_VALUES,
        "seed": seed,
        "layers": layers,
        "doubts": list(_doubts(layers, tf32=features.extractor.tf32)),
        "figures": plots,
        "n_plots_left_out": n_plots_left_out,
    }
    return page(values)


def _about_store(store: Store, facts: Facts, shown: list[Sample]) -> dict[str, Any]:
    """What the page says of the store itself, and how to open it."""
    location = _location(store.path)
    return {
        "now": datetime.now(UTC),
        "version": VERSION,
        "spec": store.spec,
        "decode": decode_spec(store.spec),
        "origin": _origin(store.spec.extractor.get("origin", {})),
        "location": location,
        "facts": facts,
        "verdict": verdict_of(facts),
        "live": LIVE,
        "stack": list(_stack(facts)),
        "statuses": STATUSES,
        "runs": list(run_facts(facts.receipts[:N_RUNS], facts.holder)),
        "tones": TONES,
        "last": as_summary(facts.last) if facts.last else None,
        "working": as_summary(facts.last_working) if facts.last_working else None,
        "quiet": _quiet(facts),
        "n_classes": N_CLASSES,
        "rest_images": sum(c.n_live for c in facts.classes[N_CLASSES:]),
        "n_hosts": N_HOSTS,
        "bad": list(zip(facts.bad, _thumbnails(store, facts.bad), strict=True)),
        "python_code": _python_code(store.path, facts, shown),
        "shell_code": "\n".join(printable(f"featuremaps {command} {location.quoted}") for command in ("status", "verify")),
    }


# -- what the template is given ------------------------------------------------------------------------------------------------------


class Location(NamedTuple):
    """Where the store is."""

    name: str
    path: str
    quoted: str
    """For a shell."""


def _location(path: Place) -> Location:
    where = str(path.absolute())
    return Location(path.name, where, shlex.quote(where))


def _stack(facts: Facts) -> Iterator[Part]:
    """The parts of the bar of statuses, in percent; one that is there takes at least a third, to be seen."""
    numbers = {name: facts.counts[name] for name in LIVE if facts.counts[name]}
    widths = {name: max(100 * n / facts.n_live, 0.33) for name, n in numbers.items()}
    start = 0.0
    for name, width in widths.items():
        yield Part(name, start, width * 100 / sum(widths.values()))
        start += width * 100 / sum(widths.values())


class Part(NamedTuple):
    """A part of a bar."""

    name: str
    start: float
    """Percent."""
    width: float


def _origin(origin: dict[str, Any]) -> str:
    """Where the weights came from, in words."""
    if "weights" in origin:
        return f"from {origin['weights']}"
    return f"drawn at random, seed {origin['seed']}" if "seed" in origin else "not said"


def _quiet(facts: Facts) -> str:
    """What the last run did, if it is complete, reached all images and computed no maps; else empty."""
    run = as_summary(facts.last) if facts.last else None
    if run is None or run.outcome != "complete" or run.n_done or run.n_unreachable:
        return ""
    workers = "" if run.did_anything or run.start_s else ", so no worker was started"
    return f"{what_it_did(receipt(run))}{workers}"


def _doubts(layers: list[dict[str, Any]], *, tf32: bool) -> Iterator[str]:
    """What to say where stored values are further off than the format allows."""
    for layer in layers:
        stored, measured = layer["stored"], layer["measured"]
        if measured is not None and measured > stored.error_bound + (TF32_ROUNDING if tf32 else ROUNDING):
            yield (
                f"{layer['name']} is off by {measured:.2g}, more than its bound {stored.error_bound:.2g}: the store or the version of a "
                "decoder has changed; run featuremaps verify."
            )


def _python_code(path: Place, facts: Facts, shown: list[Sample]) -> str:
    lines = ["import pipeline", "", f"store = pipeline.open_store({str(path.absolute())!r})"]
    lines.append("store.images  # pandas table: path, class, row, sizes, status, error")
    if facts.counts["done"]:
        lines.append("store.pooled()  # pandas table: mean, std, min and max of every map, a line per image")
        largest = max(facts.classes, key=lambda c: c.n_done)
        lines.append(f"store.dataset({largest.name!r})  # xarray.Dataset of all images of one size: lazy, float32")
    if shown:
        lines.append(f"store.image({shown[0].path!r})  # xarray.Dataset of one image, in memory")
    return "\n".join(lines)


class Plot(NamedTuple):
    """A drawing of matplotlib's."""

    caption: str
    alt: str
    picture: Embedded

    @property
    def bytes(self) -> int:
        """What it takes in a page."""
        return len(self.picture.uri)


def _filters(features: FeatureStore) -> Iterator[Plot]:
    first = features.extractor.layers[0]
    alt = f"The {first.filters} filters of conv1, {first.kernel[0]} x {first.kernel[1]} weights each"
    yield Plot("Filters of conv1", alt, _drawn(figures.filters(features)))


def _histograms(counted: list[Histogram]) -> Iterator[Plot]:
    """How values are spread, in each layer of which maps could be read."""
    from pipeline.report import draw_charts  # noqa: PLC0415 (which imports matplotlib, an extra)

    for histogram in counted:
        if not histogram.n_images:
            continue
        name, n = histogram.layer.name, len(histogram.counts)
        rest = f", the first {n} of {histogram.layer.channels} channels" if n < histogram.layer.channels else ""
        figure = draw_charts.histogram_panels(
            f"{name} of {count(histogram.n_images, 'image', commas=True)}",
            histogram.edges,
            histogram.shares,
            [f"channel {i}" for i in range(n)],
        )
        alt = f"Histograms of the values in the maps of {name}, channel by channel"
        yield Plot(f"Values of {name}{rest}", alt, _drawn(figure))


def _drawn(figure: Any) -> Embedded:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=FIGURE_DPI)
    data = file.getvalue()
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))  # of the header
    return Embedded(data_uri(data, "image/png"), width, height)


def _within_budget(found: Iterator[T], most: int) -> tuple[list[T], int]:
    """Samples or plots until they take ``most`` bytes of the page, but for the first one, and how many are left out."""
    shown: list[T] = []
    total = n_left_out = 0
    for item in found:
        total += item.bytes
        if total > most and shown:
            n_left_out += 1
        else:
            shown.append(item)
    return shown, n_left_out


def _thumbnails(store: Store, bad: list[BadImage]) -> list[Embedded | None]:
    wanted = [i for i, image in enumerate(bad) if image.code in DECODABLE][:N_THUMBNAILS]
    found: list[Embedded | None] = [None] * len(bad)
    images = [(bad[i].path, bad[i].fingerprint) for i in wanted]
    for i, picture in zip(wanted, thumbnails(store.spec.source_root, decode_spec(store.spec), images, THUMBNAIL_PX), strict=True):
        found[i] = picture
    return found


def _layers(features: FeatureStore, shown: list[Sample]) -> Iterator[dict[str, Any]]:
    """Each layer of the stack: what it is, whether and how it is stored, and how exactly."""
    stored: dict[str, StoredLayer] = {layer.name: layer for layer in features.spec.layers}
    for i, layer in enumerate(features.extractor.layers, 1):
        name = f"conv{i}"
        measured = [sample.differences[name] for sample in shown if name in sample.differences]
        field = receptive_field(features.extractor.layers, i)
        yield {
            "name": name,
            "spec": layer,
            "field": field,
            "stored": stored.get(name),
            "measured": max(measured) if measured else None,
            "n_measured": len(measured),
        }
