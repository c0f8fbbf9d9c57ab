"""How much a GPU takes at once: plain numbers, for planning too."""

from __future__ import annotations

# More pixels at once do not make a large one faster. One batch is copied while another is computed.
GPU_STAGES = 2
GPU_PIXELS = 1 << 23
MAX_GPU_BATCH = 2048


def gpu_batch(height: int, width: int) -> int:
    """Images of a size in one batch of a GPU with memory to spare: a power of two.

    Examples
    --------
    >>> gpu_batch(516, 639), gpu_batch(28, 28), gpu_batch(6000, 8000)
    (16, 2048, 1)
    """
    most = max(1, min(GPU_PIXELS // (height * width), MAX_GPU_BATCH))
    return 1 << (most.bit_length() - 1)
