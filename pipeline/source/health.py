"""Tells bad images from a bad source: if most images in a row cannot be reached, the source is at fault."""

from __future__ import annotations

from collections import deque

from pipeline.errors import FeaturemapsError

SAMPLE = 500
_ACCESS = ("missing", "permission_denied", "changed", "not_a_file")


def is_inaccessible(error: str) -> bool:
    """Whether an image's error says that it could not be reached."""
    return bool(error) and error.split(":", 1)[0] in _ACCESS


class SourceWatch:
    """Judges the source by the outcome of every image.

    Parameters
    ----------
    root : str
        The source, for the error message.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.failed = False
        """Whether most of `SAMPLE` images in a row could not be reached."""
        self._n_seen = 0
        self._n_lost = 0  # among the recent ones
        self._recent: deque[bool] = deque(maxlen=SAMPLE)

    def note(self, error: str, *, is_fault: bool) -> None:
        """Note an image's error, if any, and whether it is a fault that may pass."""
        is_lost = is_fault or is_inaccessible(error)
        self._n_seen += 1
        if len(self._recent) == SAMPLE:
            self._n_lost -= self._recent[0]
        self._recent.append(is_lost)
        self._n_lost += is_lost
        self.failed |= len(self._recent) == SAMPLE and self._n_lost > SAMPLE / 2

    def note_good(self, n: int) -> None:
        """Note ``n`` images without an error: the same as `note` of each, but with one call."""
        if self._n_lost:
            for _ in range(n):
                self.note("", is_fault=False)
        else:
            self._n_seen += n
            self._recent.extend([False] * min(n, SAMPLE))

    @property
    def is_undecided(self) -> bool:
        """Whether some images could not be reached, but too few were seen to tell why."""
        return self._n_lost > 0 and self._n_seen < SAMPLE

    def check(self) -> None:
        """Stop a run whose source failed.

        Raises
        ------
        FeaturemapsError
        """
        if self.failed:
            raise FeaturemapsError(
                f"most of {SAMPLE} images in a row cannot be read at all: the source {self.root}, not the images, is at fault, so the "
                "run stopped; check that it is mounted and readable, then run again, which tries all of them again"
            )
