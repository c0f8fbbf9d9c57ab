"""Words that people read and write: numbers with their units, names on one line, layers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import UsageError

FORM = "FILTERSxHEIGHTxWIDTH[:ACTIVATION][:poolN]"

_SIZE = re.compile(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})")
_POOL = re.compile(r"pool([0-9]{1,9})")
_CONVOLUTION = re.compile(r"(pad|padding|same|valid|stride|dilat|dilation|group|groups|s|p|d|g)[=_-]?[0-9x]*", re.IGNORECASE)


def count(n: int, noun: str, plural: str = "", *, commas: bool = False) -> str:
    """A number of things.

    Examples
    --------
    >>> count(1, "image"), count(0, "image"), count(2, "shape class", "shape classes")
    ('1 image', '0 images', '2 shape classes')
    >>> count(1200, "image", commas=True)
    '1,200 images'
    """
    return f"{f'{n:,}' if commas else n} {noun if n == 1 else plural or f'{noun}s'}"


def bad_lines(bad: Sequence[Mapping[str, str]], n_all: int | None = None) -> list[str]:
    r"""A line for each bad image, of ``path`` and ``error``, and one for those of all that are not named.

    Examples
    --------
    >>> bad_lines([{"path": "a\n.png", "error": "empty: the file has 0 bytes"}], 3)
    ['  a\\n.png  empty: the file has 0 bytes', '  and 2 more']
    """
    lines = [f"  {printable(image['path'])}  {printable(image['error'])}" for image in bad]
    n_more = 0 if n_all is None else n_all - len(bad)
    return [*lines, f"  and {n_more} more"] if n_more else lines


def skipped(suffixes: Mapping[str, int]) -> str:
    """Say how many files of a folder were skipped; ``suffixes`` has their number per suffix.

    Examples
    --------
    >>> skipped({".py": 12, "": 1})
    'Skipped 13 files without an image suffix (.py, none).'
    """
    shown = [printable(suffix) or "none" for suffix in list(suffixes)[:8]]
    return f"Skipped {count(sum(suffixes.values()), 'file')} without an image suffix ({', '.join(shown)})."


def left_out(patterns: Mapping[str, int]) -> str:
    """Say what a listing left out by name; ``patterns`` has the number of folders and files per pattern.

    Examples
    --------
    >>> left_out({"@eaDir/": 2, ".*/": 1})
    'Left out 3 folders or files by name (@eaDir/, .*/); see --exclude.'
    """
    n = sum(patterns.values())
    shown = ", ".join(map(printable, list(patterns)[:8]))
    return f"Left out {n:,} {'folder or file' if n == 1 else 'folders or files'} by name ({shown}); see --exclude."


def human_size(n_bytes: float) -> str:
    """Bytes in a unit that suits them.

    Examples
    --------
    >>> human_size(0), human_size(999), human_size(1_234_567), human_size(5e15)
    ('0 bytes', '999 bytes', '1.2 MB', '5,000 TB')
    """
    if n_bytes < 1000:
        return f"{n_bytes:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        n_bytes /= 1000
        if n_bytes < 1000:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1000:,.1f} TB".replace(".0 TB", " TB")


def human_duration(seconds: float) -> str:
    """Seconds in words.

    Examples
    --------
    >>> human_duration(1.234), human_duration(75), human_duration(7384)
    ('1.2 s', '1 min 15 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def human_moment(stamp: str) -> str:
    """A receipt's time, UTC, to the second.

    Examples
    --------
    >>> human_moment("2026-11-23T21:51:59+00:00")
    '2026-11-23 21:51:59'
    """
    return stamp[:19].replace("T", " ") or "not said"


def rounded(value: float) -> str:
    """A number of seconds, or per second, to three digits.

    Examples
    --------
    >>> rounded(0.01234), rounded(12.34), rounded(1234.5)
    ('0.0123', '12.3', '1,234')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def printable(name: str) -> str:
    r"""A name on one line, without what a terminal would obey: unprintable characters as Python escapes them.

    Examples
    --------
    >>> printable("caf\u00e9\n.jpg")
    'café\\n.jpg'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def read_layer(text: str, activations: Sequence[str]) -> dict[str, Any]:
    """The values of a layer: ``filters``, ``kernel``, and ``pool`` and ``activation`` where they are given.

    Parameters
    ----------
    text : str
        Of the form `FORM`, its words behind the first in any order.
    activations : sequence of str
        The words that are one.

    Raises
    ------
    UsageError
        When a word is unknown, is there twice, or is missing.

    Examples
    --------
    >>> read_layer("20x5x5:tanh:pool2", ["sigmoid", "tanh"])
    {'filters': 20, 'kernel': (5, 5), 'activation': 'tanh', 'pool': 2}
    """
    size, *words = text.split(":")
    match = _SIZE.fullmatch(size)
    if match is None or not all(map(int, match.groups())):
        raise _refusal(text, activations, _explain_size(size))
    filters, height, width = map(int, match.groups())
    values: dict[str, Any] = {"filters": filters, "kernel": (height, width)}
    used: dict[str, str] = {}  # the word that set each value
    for word in words:
        pool = _POOL.fullmatch(word)
        key = "activation" if word in activations else "pool" if pool and int(pool[1]) else ""
        if not key:
            raise _refusal(text, activations, _explain(word, activations))
        if key in used:
            what = "an activation" if key == "activation" else "a pool"
            raise _refusal(
                text, activations, f"{word!r} is one word too many, because {used[key]!r} is {what} and a layer has one"
            )
        used[key] = word
        values[key] = int(pool[1]) if pool else word
    return values


def _refusal(text: str, activations: Sequence[str], why: str) -> UsageError:
    return UsageError(
        f"layer {text!r} is not of the form {FORM}, so no extractor can be built from it: {why}; write for instance 2x9x9:sigmoid or "
        f"20x5x5:tanh:pool2 (activations: {', '.join(activations)})"
    )


def _explain_size(size: str) -> str:
    """What is wrong with the first word of a layer."""
    why = f"{size!r} is not three positive numbers, filters x height x width"
    if "," in size:
        return f"{why}; give --layers once for each layer"
    if not _SIZE.fullmatch(size) and _SIZE.fullmatch(size.lower().replace("*", "x")):
        return f"{why}, with a small x between them"
    return why


def _explain(word: str, activations: Sequence[str]) -> str:
    """What is wrong with a word that a layer does not know."""
    if not word:
        return "a word between two colons, or after the last one, is missing"
    if word.startswith("pool"):
        return f"{word!r} is no pool: behind pool stands one positive number, as in pool2"
    if _CONVOLUTION.fullmatch(word):
        return (
            f"{word!r} cannot be chosen, because convolutions are valid (no padding), with stride 1, without groups or dilation"
        )
    near = difflib.get_close_matches(word.lower(), [*activations, "pool2"], n=1, cutoff=0.0)[0]
    return f"{word!r} is no word of a layer; the nearest is {near!r}"
