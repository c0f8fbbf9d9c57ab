"""Single-bit flips stay within the residue that docs/decoding.md states."""

import pytest

from tests.support.flips import flips, kinds

WRONG_AT_MOST = {
    "JPEG baseline": 0.35,
    "JPEG progressive": 0.30,
    "JPEG restarts": 0.30,
    "GIF": 0.85,
    "WebP lossy": 0.95,
    "WebP lossless": 0.97,
    "AVIF": 0.60,
}


@pytest.mark.parametrize("name", kinds())
def test_flipped_bits_are_refused_or_within_the_documented_residue(name):
    ends = flips(kinds()[name], 23)
    assert ends["refused"]
    assert ends["wrong"] <= WRONG_AT_MOST[name] * ends.total(), ends
