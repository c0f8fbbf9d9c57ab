"""What a run did, in words for a person."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.errors import EXIT_QUARANTINED
from pipeline.run.summary import WAITING, Summary
from pipeline.source.dropped import describe_dropped
from pipeline.text import bad_lines, count, printable, skipped

FEW_PER_SLOT = 100
"""Images for each slot, below which a run is too short to keep its workers busy."""
_DOING = {"read": "reading", "decode": "decoding", "extract": "extracting", "write": "writing"}


def headline(summary: Summary) -> str:
    """How a run ended, in a line."""
    return (
        f"{summary.outcome}: {count(summary.n_done, 'image')} done, {summary.n_unchanged} unchanged, {summary.n_quarantined} quarantined, "
        f"{summary.n_rejected} rejected, {summary.n_pending} pending, {summary.n_removed} removed of {summary.n_listed} listed, "
        f"in {summary.elapsed_s:.1f} s"
    )


def describe(summary: Summary, store: str) -> str:
    """What a run did, for a person; names on one line each."""
    lines = [headline(summary), *describe_news(summary), *_work(summary), *_troubles(summary)]
    lines += describe_dropped(summary.dropped)
    if summary.ignored:
        lines.append(skipped(summary.ignored))
    lines += _bad(summary, store)
    lines.append(f"store {store}, receipt runs/{summary.run_id}.json")
    return "\n".join(lines)


def _work(summary: Summary) -> list[str]:
    """What was computed and compared, how fast, and by whom."""
    lines = []
    if summary.outcome == "complete" and not summary.did_anything and not summary.n_unreachable:
        lines.append("there was nothing to do: the store has every image as it is listed")
    if summary.n_done:
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in summary.shares().items() if share >= 0.005)
        lines += [
            (
                f"{summary.images_per_s:.1f} images/s, {summary.megapixels_per_s:.1f} megapixels/s on {count(summary.slots, 'slot')}; read "
                f"{summary.bytes_read / 1e6:.1f} MB, wrote {summary.bytes_written / 1e6:.1f} MB"
            ),
            f"time of the workers: {shares}; {describe_bottleneck(summary.bottleneck, summary.shares())}"
            + (_why_idle(summary) if summary.bottleneck == WAITING else ""),
        ]
    if summary.n_workers_lost:
        lines.append(f"{count(summary.n_workers_lost, 'worker was', 'workers were')} lost on the way; others did their work")
    if summary.n_checked or summary.n_unchecked:
        lines.append(
            f"{count(summary.n_checked, 'image was', 'images were')} read and compared with their digests, "
            f"{summary.n_unchecked} could not be; {summary.n_touched} had a new time only"
        )
    return lines


def _troubles(summary: Summary) -> list[str]:
    """What kept images from being looked at or done, and may pass."""
    lines = []
    if summary.faults:
        faults = "; ".join(map(printable, summary.faults[:3]))
        lines.append(f"faults that may pass: {faults}; run again to try these images again")
    if summary.unreadable_folders:
        lines.append(
            "folders that could not be read, whose images keep what they have: "
            + ", ".join(map(printable, summary.unreadable_folders[:5]))
        )
    if summary.n_unreachable:
        lines.append(
            f"{count(summary.n_unreachable, 'image')} could not be looked at and keep what they have: check links and permissions"
        )
    return lines


def _bad(summary: Summary, store: str) -> list[str]:
    """How many images of the store are bad, and what to do about it."""
    if not summary.n_bad_total:
        return []
    lines = [f"{count(summary.n_bad_total, 'bad image')} in all: featuremaps status {store} lists them with their reasons"]
    if not summary.n_done_total:
        lines.insert(
            0, "the store holds no maps at all: look at the reasons; if the settings were wrong, delete it and run with others"
        )
    elif summary.exit_code == EXIT_QUARANTINED:
        lines.append(f"exit code 3: more images are bad than --max-quarantined {summary.config['max_quarantined']} allows")
    return lines


def describe_news(summary: Summary) -> list[str]:
    r"""What was found to be other than at the last run, for a person; no lines where nothing was.

    Examples
    --------
    >>> summary = Summary("r", n_new=7, n_changed=2, n_removed=1)
    >>> for path in ("a.png", "b.png"):
    ...     summary.note_bad(path, "empty: the file has 0 bytes")
    >>> print("\n".join(describe_news(summary)))
    since the last run: 5 new, 2 changed or tried again, 1 removed
    found bad by this run: 2 empty
      a.png  empty: the file has 0 bytes
      b.png  empty: the file has 0 bytes
    """
    n_of = {
        "new": summary.n_new - summary.n_changed,
        "changed or tried again": summary.n_changed,
        "back": summary.n_returned,
        "removed": summary.n_removed,
    }
    changes = ", ".join(f"{n} {name}" for name, n in n_of.items() if n)
    lines = [f"since the last run: {changes}"] if changes else []
    if summary.reasons:
        reasons = sorted(summary.reasons.items(), key=lambda item: -item[1])
        lines.append("found bad by this run: " + ", ".join(f"{n} {code}" for code, n in reasons))
        lines += bad_lines(summary.bad, sum(summary.reasons.values()))
    return lines


def describe_bottleneck(bottleneck: str, shares: Mapping[str, float]) -> str:
    """Where most of the workers' time went.

    Parameters
    ----------
    bottleneck : str
        A stage, or `WAITING`.
    shares : mapping of str to float
        Share of each in the workers' time.

    Examples
    --------
    >>> describe_bottleneck("read", {"read": 0.61}), describe_bottleneck("waiting", {"waiting": 0.82})
    ("most of the workers' time went into reading (61%)", 'the workers were idle 82% of the time')
    """
    share = shares.get(bottleneck, 0.0)
    if bottleneck == WAITING:
        return f"the workers were idle {share:.0%} of the time"
    return f"most of the workers' time went into {_DOING.get(bottleneck, bottleneck)} ({share:.0%})"


def _why_idle(summary: Summary) -> str:
    if summary.n_done < FEW_PER_SLOT * max(1, summary.slots):
        return f": {count(summary.n_done, 'image')} cannot keep {count(max(1, summary.slots), 'slot')} busy"
    return ": they waited for headers, for the last batches, for a replaced worker or for the driver"
