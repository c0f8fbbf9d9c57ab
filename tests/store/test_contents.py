from __future__ import annotations

import numpy as np

from pipeline.store.contents import Bad, bad_images, code_of, count_class, count_rejected, count_statuses


class Columns:
    """What these functions read of a store."""

    def __init__(self, **groups):
        self.groups = {"rejected": [], **groups}
        self.classes = dict.fromkeys(groups, self)
        self.read = []

    def values(self):
        return [type("Class", (), {"name": name}) for name in self.groups if name != "rejected"]

    def column(self, group, name):
        self.read.append((group, name))
        rows = self.groups[group]
        if name == "status":
            return np.array([row[0] for row in rows], np.uint8)
        values = [row[1] for row in rows] if name == "error" else [f"{group}{i}" for i in range(len(rows))]
        return np.arange(len(rows)) if name == "size_bytes" else np.array(values, object)


def store(**groups):
    found = Columns(**groups)
    found.classes = type("Classes", (), {"values": found.values})()
    return found


DONE, PENDING, BAD, GONE, OLD = (1, ""), (0, ""), (2, "truncated: cut"), (3, ""), (4, "empty: 0 bytes")


def test_rows_are_counted_by_status_and_rejected_ones_by_those_that_are_alive():
    found = store(a=[DONE, DONE, BAD, GONE], b=[PENDING], rejected=[(2, "empty: x"), OLD])
    counts = {name: n for name, n in count_statuses(found).items() if n}
    assert counts == {"pending": 1, "done": 2, "quarantined": 1, "removed": 1, "rejected": 1}
    assert count_rejected(found) == 1
    assert sum(count_class(found, "a").values()) == 4


def test_bad_images_are_listed_rejected_ones_first_and_those_that_are_superseded_never():
    found = store(a=[DONE, BAD, OLD], b=[BAD, BAD], rejected=[OLD, (2, "empty: 0 bytes")])
    bad = bad_images(found, 3, with_reasons=True)
    assert [(image.path, image.status, image.code) for image in bad.images] == [
        ("rejected1", "rejected", "empty"),
        ("a1", "quarantined", "truncated"),
        ("b0", "quarantined", "truncated"),
    ]
    assert bad.reasons == {"truncated": 3, "empty": 1}
    assert (bad.images[0].text, bad.images[0].size_bytes) == ("0 bytes", 1)


def test_no_more_columns_are_read_than_the_list_needs():
    found = store(a=[BAD], b=[BAD])
    assert bad_images(found, 0) == Bad([], {})
    assert found.read == []
    assert len(bad_images(found, 1).images) == 1
    assert ("b", "status") not in found.read
    found.read.clear()
    assert bad_images(found, 0, with_reasons=True) == Bad([], {"truncated": 2})
    assert {name for _, name in found.read} == {"status", "error"}


def test_codes_are_stable_words():
    assert [code_of(text) for text in ("too_small: 4 x 4", "no code", "<b>x: y", "", "A B: c")] == ["too_small", *["other"] * 4]


def test_a_damaged_status_is_not_counted():
    assert count_class(store(a=[DONE, (200, "")]), "a") == {1: 1}
