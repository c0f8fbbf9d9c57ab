"""Words that people read and write: numbers of things, names on one line, layers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from pipeline.errors import UsageError

FORM = "FILTERSxHEIGHTxWIDTH[:ACTIVATION][:poolN]"

_SIZE = re.compile(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})")
_POOL = re.compile(r"pool([0-9]{1,9})")
_CONVOLUTION = re.compile(r"(pad|padding|same|valid|stride|dilat|dilation|group|groups|s|p|d|g)[=_-]?[0-9x]*", re.IGNORECASE)


def count(n: int, noun: str, plural: str = "") -> str:
    """A number of things.

    Examples
    --------
    >>> count(1, "image"), count(0, "image"), count(2, "shape class", "shape classes")
    ('1 image', '0 images', '2 shape classes')
    """
    return f"{n} {noun if n == 1 else plural or f'{noun}s'}"


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
    """What is wrong with a word that is none of a layer's."""
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
