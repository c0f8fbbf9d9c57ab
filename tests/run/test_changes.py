from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.run.plan.changes import Changes, Entries, Entry, check_removals, compare
from pipeline.source.fingerprints import UNREADABLE
from pipeline.store.schema import Status

PENDING, DONE, QUARANTINED, REMOVED, SUPERSEDED = Status


def entries(group, *rows):
    """Rows of (path, fingerprint, status) or (path, fingerprint, status, error)."""
    columns = zip(*((*row, "")[:4] for row in rows), strict=True) if rows else ((), (), (), ())
    path, fingerprint, status, error = (np.array(column, object) for column in columns)
    return Entries(group, path, fingerprint, status.astype(np.uint8), lambda: error)


def run(groups, listing, **options):
    """Compare with a listing given as {path: fingerprint}."""
    paths = list(listing)
    return compare(groups, paths, lambda i: listing[paths[i]], **options)


def test_everything_is_new_for_an_empty_store():
    found = run([], {"a": "1", "b": "2"})
    assert found.new == [0, 1]
    assert found.n_unchanged == found.n_pending == 0


def test_rows_are_taken_up_by_their_status():
    groups = [
        entries("9x9", ("a", "1", DONE), ("b", "1", PENDING), ("c", "1", QUARANTINED)),
        entries("rejected", ("d", "1", QUARANTINED)),
    ]
    listing = dict.fromkeys("abcd", "1")
    found = run(groups, listing)
    assert found.pending == {"9x9": [(1, 1)]}
    assert found.new == []
    assert found.n_unchanged == 3
    again = run(groups, listing, retry_quarantined=True)
    assert again.pending == {"9x9": [(1, 1), (2, 2)]}
    assert again.new == [3]
    assert again.replaces == {3: Entry("rejected", 0)}


def test_a_changed_image_gets_a_new_row_and_its_old_entry_is_replaced():
    found = run([entries("9x9", ("a", "1", DONE)), entries("rejected", ("b", "1", QUARANTINED))], {"a": "2", "b": "2"})
    assert found.new == [0, 1]
    assert found.replaces == {0: Entry("9x9", 0), 1: Entry("rejected", 0)}


def test_digests_are_compared_of_all_rows_that_are_done_whatever_their_fingerprint():
    groups = [
        entries("9x9", ("a", "1", DONE), ("b", "1", DONE), ("c", "1", QUARANTINED), ("d", "1", REMOVED), ("e", "1", DONE)),
        entries("rejected", ("f", "1", QUARANTINED)),
    ]
    listing = dict.fromkeys("acdf", "1") | {"b": "2", "e": UNREADABLE}
    assert run(groups, listing).n_to_check == 0
    found = run(groups, listing, check_digests=True)
    found.settle_returned(lambda _: (np.full(5, "ff"), np.full(5, "")))
    assert found.to_check == {"9x9": [(0, 0), (1, 4), (3, 2)]}
    assert (found.new, found.n_unchanged) == ([4], 4)
    found.settle_checked({0: Entry("9x9", 0), 2: Entry("9x9", 3)}, {4})
    assert (found.new, found.replaces) == ([0, 2], {0: Entry("9x9", 0), 2: Entry("9x9", 3)})
    assert (found.n_unchanged, found.returned) == (4, {"9x9": []})


def test_a_vanished_image_is_removed_only_by_a_complete_listing_and_never_below_an_unreadable_folder():
    groups = [entries("9x9", ("a", "1", DONE), ("x/b", "1", DONE), ("x", "1", PENDING))]
    assert run(groups, {"a": "1"}).set_status == {"9x9": {1: REMOVED, 2: REMOVED}}
    assert run(groups, {"a": "1"}, complete=False).set_status == {}
    assert run(groups, {"a": "1"}, unreadable=["x"]).set_status == {"9x9": {2: REMOVED}}
    assert run(groups, {"a": "1"}, unreadable=[""]).set_status == {}


def test_an_image_that_returns_unchanged_is_revived_and_a_changed_one_is_new():
    groups = [entries("9x9", ("a", "1", REMOVED), ("b", "1", REMOVED), ("c", "1", SUPERSEDED))]
    found = run(groups, {"a": "1", "b": "2", "c": "1"})
    assert found.returned == {"9x9": [(0, 0)]}
    assert found.new == [1, 2]
    assert found.set_status == {}


def test_a_removed_rejection_is_probed_again():
    found = run([entries("rejected", ("a", "1", REMOVED))], {"a": "1"})
    assert found.new == [0]
    assert found.replaces == {}


@pytest.mark.parametrize("order", [0, 1])
def test_of_two_live_rows_after_a_crash_todays_wins(order):
    old, new = entries("5x5", ("a", "1", DONE)), entries("9x9", ("a", "2", PENDING))
    found = run([old, new] if order else [new, old], {"a": "2"})
    assert found.pending == {"9x9": [(0, 0)]}
    assert found.set_status == {"5x5": {0: SUPERSEDED}}


def test_of_two_equal_live_rows_the_last_wins():
    found = run([entries("5x5", ("a", "1", DONE), ("a", "1", PENDING))], {"a": "1"})
    assert found.pending == {"5x5": [(1, 0)]}
    assert found.set_status == {"5x5": {0: SUPERSEDED}}


ROWS = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("12"), st.integers(0, 4)), max_size=12)


@given(st.lists(ROWS, max_size=3), ROWS, st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("12")), st.booleans())
def test_every_listed_image_ends_in_one_place_and_has_one_live_entry(classes, rejected, listing, retry):
    groups = [entries(f"{i}x{i}", *rows) for i, rows in enumerate(classes)] + [entries("rejected", *rejected)]
    found = run(groups, listing, retry_quarantined=retry)
    computed = [i for rows in (*found.pending.values(), *found.returned.values()) for _, i in rows]
    assert len(computed) == len(set(computed))
    assert not set(computed) & set(found.new)
    assert len(found.new) + len(computed) + found.n_unchanged == len(listing)

    live: dict[str, int] = dict.fromkeys(listing, 0)
    for group in groups:
        for row, (path, status) in enumerate(zip(group.path, group.status.tolist(), strict=True)):
            now = found.set_status.get(group.group, {}).get(row, status)
            if any(row == r for r, _ in found.returned.get(group.group, [])):
                now = DONE
            if now < REMOVED and Entry(group.group, row) not in found.replaces.values():
                assert path in listing
                live[path] += 1
    for i in found.new:
        live[list(listing)[i]] += 1
    assert set(live.values()) <= {1}


def test_many_removals_are_refused_and_few_are_not():
    check_removals(Changes(n_live=100, n_removed=10), 0.1)
    with pytest.raises(UsageError, match=r"11 of the store's 100 images .* 10%.* nothing was marked as removed"):
        check_removals(Changes(n_live=100, n_removed=11), 0.1)


def test_what_cannot_be_looked_at_just_now_keeps_its_entry():
    groups = [
        entries("9x9", ("a", "1", DONE), ("b", "1", QUARANTINED, "truncated: x"), ("c", "1", PENDING)),
        entries("rejected", ("d", "1", QUARANTINED)),
    ]
    found = run(groups, dict.fromkeys("abcd", UNREADABLE))
    assert (found.n_unchanged, found.n_unreachable, found.set_status, found.replaces) == (3, 3, {}, {2: Entry("9x9", 2)})
    assert found.new == [2]  # what was not done yet is tried, and says itself what is wrong with it
    with pytest.raises(UsageError, match=r"3 of the store's 4 images are not in the source any more, above the allowed 50%"):
        check_removals(found, 0.5)


def test_a_broken_link_that_was_rejected_stays_so():
    found = run([entries("rejected", ("d", UNREADABLE, QUARANTINED, "missing: No such file"))], {"d": UNREADABLE})
    assert (found.new, found.n_unchanged, found.n_unreachable) == ([], 1, 0)


@pytest.mark.parametrize("error", ["missing: x", "permission_denied: x", "changed: x", "not_a_file: x"])
def test_what_could_not_be_reached_is_tried_again_by_every_run(error):
    groups = [
        entries("9x9", ("a", "1", QUARANTINED, error), ("b", "1", QUARANTINED, "truncated: x")),
        entries("rejected", ("c", "1", QUARANTINED, error)),
    ]
    found = run(groups, {"a": "1", "b": "1", "c": "1"})
    assert (found.pending, found.new, found.replaces, found.n_unchanged) == ({"9x9": [(0, 0)]}, [2], {2: Entry("rejected", 0)}, 1)
    assert found.set_status == {"9x9": {0: PENDING}}


def test_a_returned_row_is_what_its_columns_say():
    group = entries("9x9", *((name, "1", REMOVED) for name in "abcd"))
    found = run([group], dict.fromkeys("abcd", "1"))
    found.settle_returned(lambda _: (np.array(["ff", "", "", ""]), np.array(["", "truncated: x", "missing: x", ""])))
    assert found.set_status == {"9x9": {0: DONE, 1: QUARANTINED, 2: PENDING, 3: PENDING}}
    assert found.pending == {"9x9": [(2, 2), (3, 3)]}


def test_a_removed_rejection_without_a_fingerprint_stands_for_nothing():
    rejected = entries("rejected", ("x", UNREADABLE, REMOVED))
    found = run([entries("9x9", ("x", "5-5", DONE)), rejected], {"x": UNREADABLE})
    assert (found.set_status, found.n_unchanged, found.n_unreachable) == ({}, 1, 1)
    found = run([rejected], {"x": UNREADABLE})
    assert (found.new, found.n_unchanged) == ([0], 0)


def test_returned_rows_are_tried_again_when_asked():
    found = run([entries("9x9", ("a", "1", REMOVED))], {"a": "1"}, retry_quarantined=True)
    found.settle_returned(lambda _: (np.array([""]), np.array(["truncated: x"])))
    assert found.pending == {"9x9": [(0, 0)]}
