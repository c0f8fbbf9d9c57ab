"""Normalises the name of a source, and tells whether two names mean the same source."""

from __future__ import annotations

import os

from pipeline.patterns import Pattern, absolute, absolute_patterns, escape, expand, is_pattern, literal
from pipeline.source.names import suffix_of
from pipeline.source.path_lists import READERS
from pipeline.source.urls import Url, is_url


def absolute_source(source: str) -> str:
    """A source in the form that a store records: absolute, and the same for every spelling, except for links."""
    if is_url(source):
        return str(Url.parse(source))
    if os.path.exists(absolute(source)) or not is_pattern(source):
        return absolute(source)
    spelled = absolute_patterns(source)
    if len(spelled) == 1:
        return named_by(spelled) or spelled[0]
    pattern = Pattern.of(spelled)
    return f"{escape(pattern.root)}/{{{','.join(sorted(map('/'.join, pattern.tails)))}}}"


def is_same_source(one: str, other: str) -> bool:
    """Whether two sources list the same images, however they are written; links to the folder are followed."""
    return one == other or _resolved(one) == _resolved(other)


def is_same_folder(one: str, other: str) -> bool:
    """Whether two roots are the same folder, perhaps through a link."""
    if one == other or is_url(one) or is_url(other):
        return one == other
    return os.path.realpath(one) == os.path.realpath(other)


def _resolved(source: str) -> object:
    """What a source names, with links to the folder resolved."""
    if is_url(source):
        url = Url.parse(source)
        return url.base, sorted(set(expand(url.key)))
    path = absolute_source(source)
    if os.path.exists(path) or not is_pattern(path):
        return os.path.realpath(path)
    pattern = Pattern.of(absolute_patterns(path))
    return os.path.realpath(pattern.root or "/"), sorted(pattern.tails)


def named_by(spelled: list[str]) -> str | None:
    """The folder or list that a pattern without wildcards names; its brackets may be escaped without need."""
    name = literal(spelled[0])
    if len(spelled) > 1 or name is None:
        return None
    return name if os.path.isdir(name) or (suffix_of(name) in READERS and os.path.isfile(name)) else None


def bucket_pattern(url: Url) -> Pattern:
    """The pattern for a bucket's keys; it has no tail if the URL is a folder."""
    if not is_pattern(url.key):
        return Pattern(url.key, ())
    spelled = sorted(set(expand(url.key)))
    name = literal(spelled[0])
    return Pattern(name, ()) if len(spelled) == 1 and name is not None else Pattern.of(spelled)
