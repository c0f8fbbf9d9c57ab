"""The state of a store; changes nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.cluster.batch_commands import QueuedJob
from pipeline.cluster.submit.record import GONE, Submission, last_submission
from pipeline.errors import EXIT_USAGE, UsageError
from pipeline.run.summary import failure
from pipeline.run.summary_text import describe_bottleneck, what_it_did
from pipeline.source.dropped import describe_dropped
from pipeline.store.contents import bad_images, count_statuses
from pipeline.store.lock import current_holder, last_heard
from pipeline.store.named import named_store
from pipeline.store.objects import Place
from pipeline.store.store import Store, is_store
from pipeline.text import bad_lines, count, printable


@dataclass(slots=True)
class StoreStatus:
    """How far a store is."""

    store: str
    source: str
    dtype: str
    has_maps: bool
    """False if only pooled values are kept."""
    n_classes: int
    counts: dict[str, int]
    bad: list[dict[str, str]]
    """The first quarantined and rejected images: path and error."""
    holder: dict[str, Any] | None
    """The current holder, with ``silent_s``, the seconds since its last heartbeat; there is a heartbeat every 10 s."""
    last_run: dict[str, Any] | None
    """The newest receipt; a running run writes its receipt every 10 s."""
    submission: dict[str, Any] | None = None
    """What was submitted to a batch system, with ``state`` in words and the ``jobs`` that work for the store."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Images added by the runs of which a part was dropped, per code of `dropped.dropped`."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"is_at_work": self.holder is not None, "left_s": self.left_s}

    @property
    def left_s(self) -> float | None:
        """Seconds until the current run ends at its present pace; None if unknown."""
        run = self.last_run
        if not self.holder or not run or run["run_id"] != self.holder["run_id"] or not run["images_per_s"]:
            return None
        finished = sum(run[name] for name in ("n_unchanged", "n_returned", "n_done", "n_quarantined", "n_rejected"))
        return float((run["n_listed"] - finished) / run["images_per_s"])

    def describe(self) -> str:
        """For a person."""
        what = f"{self.dtype} maps" if self.has_maps else "pooled values"
        lines = [
            f"{self.store}: {count(self.n_classes, 'shape class', 'shape classes')} of {what} from {self.source}",
            ", ".join(f"{n} {name}" for name, n in self.counts.items()),
        ]
        lines += self._describe_holder(self.holder) if self.holder else []
        lines += self._describe_run(self.last_run) if self.last_run else []
        if self.submission:
            known = self.submission
            lines.append(
                f"submitted to {known['kind']} as job {known['job_id'] or '?'} on {known['submitted']}: {known['state']}"
            )
            lines += [f"  {QueuedJob(**job)}" for job in known["jobs"] if job["job_id"] != known["job_id"]]
        lines += describe_dropped(self.dropped)
        lines += bad_lines(self.bad)
        n_more = self.counts["quarantined"] + self.counts["rejected"] - len(self.bad)
        if n_more:
            lines.append(f"  and {count(n_more, 'more bad image')}: --quarantined N lists N")
        return "\n".join(lines)

    def _describe_holder(self, holder: dict[str, Any]) -> list[str]:
        """Who works on the store."""
        left = f", about {self.left_s:.0f} s left" if self.left_s is not None else ""
        job = f" (job {holder['job_id']})" if holder["job_id"] else ""
        heard = last_heard(holder["silent_s"] - holder["ahead_s"])
        return [f"run {holder['run_id']} works on it: process {holder['pid']} on {holder['host']}{job}, {heard}{left}"]

    def _describe_run(self, run: dict[str, Any]) -> list[str]:
        """What the last run did."""
        is_dead = run["outcome"] == "running" and not self.holder
        failed = failure(run["message"])
        is_refused = run["outcome"] == "failed" and failed.exit_code == EXIT_USAGE
        line = f"last run {run['run_id']}: "
        if is_dead:
            line += "died before its end; the same command goes on"
            line += f", {what_it_did(run)}" if run["n_done"] else ""
        else:
            line += "refused" if is_refused and not run["n_done"] else f"{run['outcome']}, {what_it_did(run)}"
        if run["bottleneck"] and (run["n_done"] or run["n_checked"]):
            line += f", {describe_bottleneck(run)}"
        lines = [line + (f" -- {failed.reason}" if failed.reason else "")]
        if run["outcome"] in {"incomplete", "stopped"} and run["n_pending"]:
            faults = "; ".join(map(printable, run["faults"][:3]))
            lines.append(f"it left {count(run['n_pending'], 'image')} to the next run" + (f": {faults}" if faults else ""))
        return lines


def store_status(store: str | Place, n_bad: int = 20) -> StoreStatus:
    """Read the state of a store.

    Parameters
    ----------
    store : str, Path or Url
        A folder, or a bucket's URL.
    n_bad : int
        Bad images to list.

    Raises
    ------
    UsageError
        When there is no store.
    """
    path = named_store(store)
    submission = last_submission(path)
    if submission is not None and not is_store(path):
        raise UsageError(_not_there_yet(path, submission))
    state, jobs = ("", []) if submission is None else submission.look()
    opened = Store(path)
    last = opened.last_receipt()
    return StoreStatus(
        str(path),
        opened.spec.source,
        opened.spec.dtype,
        bool(opened.spec.map_layers),
        len(opened.classes),
        count_statuses(opened),
        [{"path": image.path, "error": image.error} for image in bad_images(opened, n_bad).images],
        current_holder(path),
        last,
        None if submission is None else asdict(submission) | {"state": state, "jobs": jobs},
        (last or {}).get("dropped_total") or {},
    )


def _not_there_yet(path: Place, submission: Submission) -> str:
    """Why a submitted run has no store yet, and what to do."""
    state, _ = submission.look()
    remedy = (
        f"It ended before the store was created; {submission.job_name}-driver*, in log_folder of the cluster, says why: correct "
        "that and submit again"
        if state == GONE
        else "Wait until it has begun"
    )
    return (
        f"store {path} does not exist yet; its run was submitted to {submission.kind} as job {submission.job_id or '?'} on "
        f"{submission.submitted}: {state}. {remedy}"
    )
