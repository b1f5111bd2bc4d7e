"""Keeps freed message memory in the process.

ZeroMQ allocates every body anew, and glibc returns blocks of this size to the kernel at once: each frame would pay for
its page faults again (measured: a third of the receiver's system time).
"""

import ctypes

_M_TRIM_THRESHOLD = -1  # <malloc.h>
_M_MMAP_THRESHOLD = -3


def keep_freed_memory(max_message_bytes: int, kept_bytes: int) -> None:
    """For the whole process: bodies up to `max_message_bytes` come from the heap, whose top keeps `kept_bytes`.

    Does nothing where the C library has no mallopt: nothing depends on it but speed.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, 2 * max_message_bytes)
        mallopt(_M_TRIM_THRESHOLD, kept_bytes)
