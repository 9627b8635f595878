"""Memory that threads free and nobody gives back."""

import ctypes
import platform

_M_ARENA_MAX = -8  # malloc.h of glibc


def one_heap() -> None:
    """Make the threads of this process share one heap from here on; does nothing where the C library is not glibc.

    glibc gives threads heaps of their own, and what one frees the others cannot use: calibration then holds a sixth
    more memory and is not faster.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
