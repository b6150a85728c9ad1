"""How this process gets its memory: blocks that were freed are kept, for a training step frees and takes the same ones.

The allocator of the C library gives large blocks back to the system when they are freed, and each page of the next one
costs a fault: a third of the time of a step on a CPU. It maps those apart too that a thread asks for which has an arena
of its own, as XLA's threads do for all that a program keeps while it runs; so there is one arena for all.
"""

import ctypes
import os
import platform

# "system" leaves the allocator as it is.
VARIABLE = "RUSTGPT_JAX_MALLOC"
# Parameters of mallopt(3): how much free memory at the end of the heap is given back, what the heap grows by at least,
# how many blocks may be mapped apart from the heap, and how many arenas there are. It takes an int and makes a size of
# it: -1 is the largest of all.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8
WANTED = ((TRIM_THRESHOLD, -1), (TOP_PAD, 64 * 1024**2), (MMAP_MAX, 0), (ARENA_MAX, 1))
# What a user has told the allocator stays.
OWN_SETTINGS = (
    "MALLOC_ARENA_MAX",
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
    kept = [mallopt(parameter, value) for parameter, value in WANTED]
    return all(kept)
