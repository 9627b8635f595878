"""Canonical JSON and digests: one byte string for one value, so that equal evidence has equal digests.

Standard library only. The form is JSON with sorted keys, no white space, UTF-8, and no NaN or infinity; floats are
written by Python's shortest round-trip form (IEEE 754 binary64), which is the same on every platform.
"""

import hashlib
import json
import sys
from array import array
from collections.abc import Sequence
from typing import Any, Literal

Json = Any
Digest = str
"""A SHA-256 in 64 lower-case hexadecimal characters."""


def canonical_json(value: Json) -> bytes:
    """Return the canonical JSON of `value`.

    Raises:
        ValueError: `value` holds NaN or infinity.
        TypeError: `value` holds something that JSON has no form for.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256_bytes(data: bytes) -> Digest:
    """Return the SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Json) -> Digest:
    """Return the SHA-256 of the canonical JSON of `value`."""
    return sha256_bytes(canonical_json(value))


def sha256_numbers(kind: Literal["q", "d"], numbers: Sequence[float]) -> Digest:
    """Return the SHA-256 of `numbers` as little-endian int64 (`q`) or float64 (`d`).

    Raises:
        ValueError: a number is not one of these.
    """
    try:
        column = array(kind, numbers)
    except (OverflowError, TypeError) as e:
        raise ValueError(f"a column holds what is no {'int64' if kind == 'q' else 'float64'}: {e}") from e
    if sys.byteorder == "big":
        column.byteswap()
    return sha256_bytes(column.tobytes())
