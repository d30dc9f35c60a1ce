"""Process settings that must stand before torch is imported. The user's own environment wins."""

import ctypes
import os

# libgomp's threads spin at barriers: beside one other busy process every small op waits for a
# whole time slice (9.4 s against 0.08 s for a loop of small ops).
os.environ.setdefault("GOMP_SPINCOUNT", "0")
# What cuBLAS asks for so that the same product gives the same bytes (`device.repeatable`).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def prepare_torch() -> None:
    """For whoever computes with it: memory that is kept, and one thread; `cores` has the others."""
    import torch

    keep_memory()
    torch.set_num_threads(1)


def keep_memory() -> None:
    """Stop glibc from handing memory back at every training step and faulting it in again.

    Does nothing where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):
        mallopt(option, value)
