from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np

from pipeline.run.results import Outcomes
from pipeline.run.summary import Progress, Summary, receipt
from pipeline.run.tasks import BatchResult, PieceResult
from pipeline.store.schema import Status


def test_kernels_of_the_receipt_add_up_to_the_images_done():
    summary = Summary("r")
    context = SimpleNamespace(found=None, summary=summary, progress=Progress(3))
    ledger = SimpleNamespace(commit=lambda *_, **__: None)  # its own tests write one
    outcomes = Outcomes(context, ledger, SimpleNamespace(is_undecided=False, failed=False, note_good=lambda _: None, check=int))
    for kernels in ({"avx2": 1, "torch": 1}, {"avx2": 2}):
        n = sum(kernels.values())
        piece = PieceResult(None, 0, n, tuple(range(n)), np.full(n, Status.DONE, np.uint8), [""] * n, [""] * n, [""] * n)
        outcomes.take(BatchResult([piece], "host", {}, kernels=Counter(kernels)))
    outcomes.commit()
    assert receipt(summary)["kernels"] == {"avx2": 3, "torch": 1}
    assert summary.n_done == 4
