"""How this process gets its memory: blocks that were freed are kept, for a training step frees and takes the same ones.

The allocator of the C library gives large blocks back to the system when they are freed, and each page of the next one
costs a fault: a third of the time of a small model's step on a CPU.
"""

import ctypes
import os
import platform

# "system" leaves the allocator as it is.
VARIABLE = "RUSTGPT_JAX_MALLOC"
# Parameters of mallopt(3): how much free memory at the end of the heap is given back, what the heap grows by at least, and
# how many blocks may be mapped apart from the heap. It takes an int and makes a size of it: -1 is the largest of all.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
WANTED = ((TRIM_THRESHOLD, -1), (TOP_PAD, 64 * 1024**2), (MMAP_MAX, 0))
# What a user has told the allocator stays.
OWN_SETTINGS = (
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)


def keep_freed_memory() -> bool:
    """Have freed blocks kept for the next ones, whatever their size. Whether it was done: only glibc can.

    To be called before the first large allocation. The process holds what it needed at its fullest until it ends.
    """
    if os.environ.get(VARIABLE) == "system" or any(name in os.environ for name in OWN_SETTINGS):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) for parameter, value in WANTED])
