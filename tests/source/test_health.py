from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import FeaturemapsError
from pipeline.source.health import SAMPLE, SourceWatch


def note(watch: SourceWatch, *errors: str, is_fault: bool = False) -> None:
    for error in errors:
        watch.note(error, is_fault=is_fault)


def test_a_source_fails_when_most_of_a_stretch_cannot_be_reached_wherever_it_lies():
    watch = SourceWatch("/photos")
    note(watch, *[""] * 1000)
    note(watch, *["missing: x"] * (SAMPLE // 2))
    watch.check()
    note(watch, "", is_fault=True)
    note(watch, *[""] * 2000)  # what follows does not hide it
    assert watch.failed
    with pytest.raises(
        FeaturemapsError, match=r"most of 500 images in a row cannot be read at all: the source /photos, not the im"
    ):
        watch.check()


def test_bad_images_say_nothing_about_the_source():
    watch = SourceWatch("/photos")
    note(watch, *["truncated: x", "corrupt: x"] * SAMPLE)
    assert not watch.failed
    assert not watch.is_undecided


def test_of_a_few_images_nobody_can_tell():
    watch = SourceWatch("/photos")
    note(watch, "", "permission_denied: x")
    assert watch.is_undecided
    note(watch, *[""] * SAMPLE)
    assert not watch.is_undecided


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(["", "missing: x", "corrupt: x"]), st.integers(0, SAMPLE)), max_size=8))
def test_good_images_noted_together_count_as_each_alone(events):
    together, alone = SourceWatch("/photos"), SourceWatch("/photos")
    for event in events * 10:  # an error, or this many good images
        if isinstance(event, str):
            note(together, event)
            note(alone, event)
        else:
            together.note_good(event)
            note(alone, *[""] * event)
        assert vars(together) == vars(alone)
