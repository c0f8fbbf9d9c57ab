"""After any sequence of add, change, delete, kill and run, a store holds what one run on the final collection makes."""

from __future__ import annotations

import pytest

from tests.support.growth import Growth, grow


@pytest.mark.kill
def test_any_history_of_a_collection_ends_in_the_store_of_one_run(tmp_path):
    grow(tmp_path, examples=8, steps=15)  # as many as the suite has time for: `tests.system.kill.growth_rounds` does the many
    assert Growth.n_runs > 20
    assert Growth.n_kills - Growth.n_late_kills > 2  # it is by chance how many come in time
