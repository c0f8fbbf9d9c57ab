"""Has every process with this folder on PYTHONPATH take the processor for one GPU: batches, shares and processes, but no streams.

Python imports it at its start. ``CUDA_VISIBLE_DEVICES=""`` hides this GPU, too.
"""

import os
from contextlib import suppress

with suppress(ImportError):  # of another Python, without featuremaps
    from pipeline.extract import devices, gpu_sizes

    devices.n_gpus = lambda: int(os.environ.get("CUDA_VISIBLE_DEVICES") != "")
    devices.device_of = lambda _: "cpu"
    gpu_sizes.MAX_GPU_BATCH = 16  # a batch is computed whole, however few images it has
