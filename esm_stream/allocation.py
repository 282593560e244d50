"""Give freed memory back to the system, so that a task's peak is its own and not its predecessors'.

glibc raises its limit for separate mappings up to 32 MiB as large blocks are freed, and then keeps
blocks below it in its heaps: panels and small matrices of finished tasks would stay in the process.
"""

import ctypes
from functools import cache

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
LARGE_BYTES = 1 << 20


@cache
def return_freed_memory() -> None:
    """Fix glibc's thresholds, once per process; where there is no glibc, do nothing."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
    mallopt(_M_TRIM_THRESHOLD, LARGE_BYTES)
    mallopt(_M_ARENA_MAX, 2)
