"""Describes in words what a run did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import EXIT_QUARANTINED
from pipeline.run.summary import SAID_S, WAITING, Summary, receipt
from pipeline.source.dropped import describe_dropped
from pipeline.text import bad_lines, count, human_size, left_out, printable, rounded, skipped

FEW_PER_SLOT = 100
"""With fewer images per slot, a run is too short to keep its workers busy."""
SHORT_S = 5.0
"""A complete run is too short if fewer seconds pass between its first task and its last, whatever the number of images."""
_DOING = {"read": "reading", "decode": "decoding", "extract": "extracting", "write": "writing"}


def headline(summary: Summary) -> str:
    """How a run ended, in one line."""
    return str(summary)


def describe(summary: Summary, store: str) -> str:
    """What a run did, in words; each name on its own line."""
    lines = [headline(summary), *describe_news(summary), *_work(summary), *_troubles(summary)]
    lines += describe_dropped(summary.dropped)
    if summary.ignored:
        lines.append(skipped(summary.ignored))
    if summary.excluded:
        lines.append(left_out(summary.excluded))
    lines += _bad(summary, store)
    lines.append(f"store {store}, receipt runs/{summary.run_id}.json")
    return "\n".join(lines)


def _work(summary: Summary) -> list[str]:
    """What was computed and compared, how fast, and by whom."""
    lines = []
    is_idle = summary.outcome == "complete" and not summary.start_s and not summary.n_done
    if summary.outcome == "complete" and not summary.did_anything and not summary.n_unreachable:
        no_worker = ", so no worker was started" if is_idle else ""
        lines.append(f"there was nothing to do{no_worker}: the store has every image as it is listed")
    elif is_idle and not (summary.n_new or summary.n_checked or summary.n_unchecked or summary.n_unreachable):
        lines.append("no image had to be computed, so no worker was started")
    if summary.n_done:
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in summary.shares().items() if share >= 0.005)
        lines += [
            (
                f"{rounded(summary.images_per_s)} images/s, {rounded(summary.megapixels_per_s)} megapixels/s "
                f"on {count(summary.slots, 'slot')}"
                f"{f' once the {_plural(summary.workers)} had started' if summary.start_s >= SAID_S else ''}; "
                f"read {human_size(summary.bytes_read)}, wrote {human_size(summary.bytes_written)}"
            ),
            f"time of the {_plural(summary.workers)}: {shares}; {describe_bottleneck(receipt(summary))}",
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
    """Faults that may pass, and images and folders that could not be read."""
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
            f"{count(summary.n_unreachable, 'image')} could not be accessed and keep what they have: check links and permissions"
        )
    return lines


def _bad(summary: Summary, store: str) -> list[str]:
    """Number of bad images in the store, and what to do about them."""
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
    r"""What changed since the last run, in words; no lines if nothing changed.

    Examples
    --------
    >>> summary = Summary("r", n_new=7, n_changed=2, n_retried=1, n_left=3, n_removed=1)
    >>> for path in ("a.png", "b.png"):
    ...     summary.note_bad(path, "empty: the file has 0 bytes")
    >>> print("\n".join(describe_news(summary)))
    since the last run: 2 new, 3 that it had not begun, 1 changed, 1 rejected and tried again, 1 removed
    found bad by this run: 2 empty
      a.png  empty: the file has 0 bytes
      b.png  empty: the file has 0 bytes
    """
    n_of = {
        "new": summary.n_new - summary.n_changed - summary.n_left,
        "that it had not begun": summary.n_left,
        "changed": summary.n_changed - summary.n_retried,
        "rejected and tried again": summary.n_retried,
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


def describe_bottleneck(run: Mapping[str, Any]) -> str:
    """Where most of the workers' time went, and why they were idle, if they were.

    Parameters
    ----------
    run : mapping
        A receipt.

    Examples
    --------
    >>> describe_bottleneck({"bottleneck": "read", "shares": {"read": 0.61}, "workers": 2})
    "most of the workers' time went into reading (61%)"
    >>> idle = {"bottleneck": "waiting", "shares": {"waiting": 0.82}, "outcome": "complete", "compute_s": 0.4}
    >>> describe_bottleneck(idle | {"n_done": 28, "n_pending": 0, "slots": 2, "workers": 2})
    'the workers were idle 82% of the time: too little work (28 images) to keep 2 workers busy'
    """
    bottleneck, workers = run["bottleneck"], _plural(run.get("workers"))
    share = run["shares"].get(bottleneck, 0.0)
    if bottleneck == WAITING:
        why = _why_idle(run)
        idle = "the worker was idle" if workers == "worker" else "the workers were idle"
        return f"{idle} {share:.0%} of the time{f': {why}' if why else ''}"
    whose = "worker's" if workers == "worker" else "workers'"
    return f"most of the {whose} time went into {_DOING.get(bottleneck, bottleneck)} ({share:.0%})"


def _plural(n_workers: int | None) -> str:
    """The word for the workers of a run; early receipts do not tell how many there were."""
    return "worker" if n_workers == 1 else "workers"


def what_it_did(run: Mapping[str, Any]) -> str:
    """The images that a run did, found bad, and so on; of a complete run, only what it did.

    Examples
    --------
    >>> nothing = dict.fromkeys(("n_done", "n_new", "n_quarantined", "n_rejected", "n_removed", "n_checked"), 0)
    >>> what_it_did(nothing | {"outcome": "complete"}), what_it_did(nothing | {"outcome": "complete", "n_removed": 2})
    ('there was nothing to do', '2 removed')
    """
    n_of = {
        "found bad": run["n_quarantined"] + run["n_rejected"],
        "removed": run["n_removed"],
        "back": run.get("n_returned", 0),
        "compared": run["n_checked"],
    }
    did = [f"{n} {name}" for name, n in n_of.items() if n]
    if run["n_done"] or run["outcome"] != "complete" or (run["n_new"] and not did):
        pace = f" at {rounded(run['images_per_s'])} images/s on {count(run['slots'], 'slot')}" if run["n_done"] else ""
        did.insert(0, f"{run['n_done']} done{pace}")
    return ", ".join(did) or "there was nothing to do"


def _why_idle(run: Mapping[str, Any]) -> str:
    """Why the workers of a run that ended normally were idle; empty if the run failed or still runs."""
    if run["outcome"] in {"running", "failed"}:
        return ""  # the amount of work is not known
    slots, n_images = max(1, run["slots"]), run["n_done"] + run["n_pending"]
    if n_images < FEW_PER_SLOT * slots or (run["outcome"] == "complete" and run["compute_s"] < SHORT_S):
        workers = count(slots, "worker" if slots == run.get("workers") else "slot")
        return f"too little work ({count(n_images, 'image')}) to keep {workers} busy"
    waited = "it waited" if run.get("workers") == 1 else "they waited"
    return f"{waited} for headers, for the last batches, for a replaced worker or for the driver"
