"""Glob patterns of files and of a bucket's keys: what they name, in one spelling. Rules are the shell's, as Python's glob has them.

``*``, ``?`` and ``[...]`` match within a name, ``**`` any depth. None of them matches a leading dot. ``{a,b}`` and ``{1..9}`` are
expanded first. A name with brackets is written ``photos [[]2024]``; ``photos [2024]`` is taken as that name where it exists.
"""

from __future__ import annotations

import fnmatch
import os
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise

from pipeline.errors import UsageError

MAX_ALTERNATIVES = 1000
"""Patterns that the braces of one source may stand for."""

State = frozenset[int]
"""Places in a pattern that a path has reached."""

_MAGIC = re.compile(r"[*?[]")
_ESCAPED = re.compile(r"\[([]*?[{},])\]")
_CLASS = re.compile(r"\[!?\]?[^\]/]*\]")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?|([A-Za-z])\.\.([A-Za-z])")


def is_pattern(text: str) -> bool:
    """Whether a source has wildcards, or braces that the shell would expand.

    Examples
    --------
    >>> [is_pattern(text) for text in ("a/*.jpg", "a.{jpg,png}", "photos", "{photos}")]
    [True, True, False, False]
    """
    return bool(_MAGIC.search(text)) or _group(text) is not None


def escape(name: str) -> str:
    """A path as a pattern that matches only itself.

    Examples
    --------
    >>> escape("photos [2024]/a,b")
    'photos [[]2024]/a[,]b'
    """
    return re.sub(r"[*?[{},]", lambda match: f"[{match[0]}]", name)


def literal(part: str) -> str | None:
    """The only name that a part without wildcards matches, else None.

    Examples
    --------
    >>> literal("photos [[]2024]"), literal("photos [2024]")
    ('photos [2024]', None)
    """
    return None if _MAGIC.search(_ESCAPED.sub("", part)) else _ESCAPED.sub(r"\1", part)


def expand(text: str) -> list[str]:
    """The patterns that braces stand for, as a shell has them; braces in brackets are characters.

    Raises
    ------
    UsageError
        When there are too many.

    Examples
    --------
    >>> expand("*.{jp{,e}g,png}")
    ['*.jpg', '*.jpeg', '*.png']
    >>> expand("day{08..10}"), expand("{photos}"), expand("[{]a,b}")
    (['day08', 'day09', 'day10'], ['{photos}'], ['[{]a,b}'])
    """
    group = _group(text)
    if group is None:
        return [text]
    start, stop, options = group
    tails = expand(text[stop:])
    heads = [f"{text[:start]}{inner}" for option in options for inner in expand(option)]
    if len(heads) * len(tails) > MAX_ALTERNATIVES:
        raise UsageError(
            f"the braces of {text!r} stand for {len(heads) * len(tails)} patterns, more than {MAX_ALTERNATIVES}, so nothing was listed; "
            "use * or [0-9] in their place, or give a .txt list"
        )
    return [head + tail for head in heads for tail in tails]


def _group(text: str) -> tuple[int, int, list[str]] | None:
    """Start, end and alternatives of the first braces that stand for several names."""
    opened: list[tuple[int, list[int]]] = []  # each open brace with its commas
    found: tuple[int, int, list[int]] | None = None
    i = 0
    while i < len(text):
        if text[i] == "[" and (match := _CLASS.match(text, i)):
            i = match.end()
            continue
        if text[i] == "{":
            opened.append((i, []))
        elif text[i] == "," and opened:
            opened[-1][1].append(i)
        elif text[i] == "}" and opened:
            start, commas = opened.pop()
            if (commas or _RANGE.fullmatch(text[start + 1 : i])) and (found is None or start < found[0]):
                found = start, i, commas
            if found is not None and not opened:
                break
        i += 1
    if found is None:
        return None
    start, stop, commas = found
    bounds = [start, *commas, stop]
    options = [text[a + 1 : b] for a, b in pairwise(bounds)]
    return start, stop + 1, options if commas else _range(options[0])


def _range(text: str) -> list[str]:
    """Numbers or letters from one to another, both included."""
    match = _RANGE.fullmatch(text)
    if match is None:
        return [text]
    if match[4]:
        first, last, step = ord(match[4]), ord(match[5]), 1
    else:
        first, last, step = int(match[1]), int(match[2]), abs(int(match[3] or 1)) or 1
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    if len(numbers) > MAX_ALTERNATIVES:
        raise UsageError(
            f"{{{text}}} stands for {len(numbers)} names, more than {MAX_ALTERNATIVES}, so nothing was listed; use * or [0-9] in its place"
        )
    if match[4]:
        return [chr(number) for number in numbers]
    padded = any(re.match(r"-?0\d", end) for end in match.groups()[:2])
    width = max(len(match[1]), len(match[2])) if padded else 0
    return [f"{number:0{width}d}" for number in numbers]


def home(path: str) -> str:
    """A path whose leading ``~`` or ``~user`` is that home folder; unchanged where there is no such user."""
    return os.path.expanduser(path) if path.startswith("~") else path


def has_unknown_user(path: str) -> bool:
    """Whether a path begins with ``~user``, and there is no such user."""
    return path.startswith("~") and home(path) == path


def absolute(path: str) -> str:
    """An absolute path, without links being looked at; of a leading ``~`` the home folder."""
    return "/" + os.path.abspath(home(path)).lstrip("/")  # POSIX keeps a leading "//"


def absolute_patterns(source: str) -> list[str]:
    """The absolute patterns that a source of this machine stands for, each once, in one spelling and order."""
    here = escape(os.getcwd())
    spelled = (os.path.join(here, home(text)) for text in expand(_keep_names(home(source))))
    return sorted({"/" + os.path.normpath(text).lstrip("/") for text in spelled})


def _keep_names(source: str) -> str:
    """Escape the leading folders that exist under the very name that is written, brackets and braces included."""
    parts = source.split("/")
    names: list[str] = []
    for i, part in enumerate(parts):
        name: str | None = part
        if is_pattern(part) or "{" in part:
            if "*" not in part and "?" not in part and os.path.lexists(absolute("/".join([*names, part]))):
                parts[i] = escape(part)
            else:
                name = None if _group(part) else literal(part)
        if name is None:
            break
        names.append(name)
    return "/".join(parts)


@dataclass(frozen=True)
class Pattern:
    """One or several patterns below one folder, as steps from name to name."""

    root: str
    """What comes before the first wildcard of all of them, as it is: a folder, or a part of a key."""
    tails: tuple[tuple[str, ...], ...]
    """Parts of each below it, of which at least one; none at all where there is only the folder."""

    @classmethod
    def of(cls, patterns: list[str]) -> Pattern:
        """Understand patterns whose parts are separated by single slashes.

        Examples
        --------
        >>> Pattern.of(["/in/a/*.jpg", "/in/b/**/**/x.png"])
        Pattern(root='/in', tails=(('a', '*.jpg'), ('b', '**', 'x.png')))
        """
        split = [pattern.split("/") for pattern in patterns]
        roots = [_head(parts) for parts in split]
        shared = 0
        while all(len(root) > shared and root[shared] == roots[0][shared] for root in roots):
            shared += 1
        return cls("/".join(roots[0][:shared]), tuple(_tail(parts[shared:]) for parts in split))

    @cached_property
    def _parts(self) -> tuple[str, ...]:
        """All tails, one after the other, each closed by an empty part."""
        return tuple(chain.from_iterable((*tail, "") for tail in self.tails))

    @cached_property
    def start(self) -> State:
        """The places of the root."""
        places = [0, *(i + 1 for i, part in enumerate(self._parts) if not part)]
        return frozenset(chain.from_iterable(map(self._reach, places[: len(self.tails)])))

    def _reach(self, place: int) -> State:
        """The places reached with ``place``: ``**`` may also match nothing."""
        return frozenset({place, place + 1} if self._parts[place] == "**" else {place})

    def step(self, state: State, name: bytes) -> State:
        """The places after one more name of a path."""
        text = os.fsdecode(name)
        after: State = frozenset()
        for place in state:
            part = self._parts[place]
            if not part or (text.startswith(".") and not part.startswith(".")):
                continue
            if part == "**":
                after |= self._reach(place)
            elif fnmatch.fnmatchcase(text, part):
                after |= self._reach(place + 1)
        return after

    def ends(self, state: State) -> bool:
        """Whether what was walked so far matches."""
        return any(not self._parts[place] for place in state)

    def goes_on(self, state: State) -> bool:
        """Whether something below may match."""
        return any(self._parts[place] for place in state)


def _head(parts: list[str]) -> list[str]:
    """The names before the first wildcard, but never the last one."""
    names: list[str] = []
    for part in parts[:-1]:
        name = literal(part)
        if name is None:
            break
        names.append(name)
    return names


def _tail(parts: list[str]) -> tuple[str, ...]:
    """Parts without one ``**`` after another; below a last one is every file, but a file in its place is none of them."""
    return tuple(p for i, p in enumerate(parts) if not (i and p == parts[i - 1] == "**")) + ("*",) * (parts[-1] == "**")


def what_to_type(source: str) -> str:
    """A hint for a pattern that matches nothing, maybe because its brackets or braces were meant as a name."""
    hints = []
    if "[" in _ESCAPED.sub("", source):
        typed = re.sub(rf"{_ESCAPED.pattern}|\[", lambda match: match[0] if match[1] else "[[]", source)
        hints.append(f"brackets stand for one character of those between them: for a name with brackets type {typed!r}")
    if "{" in _ESCAPED.sub("", source) and _group(source) is None:
        hints.append("braces need a comma, as in *.{jpg,png}")
    return f" ({'; '.join(hints)})" if hints else ""
