"""How much of a model has to be sent to a device that has another one: zstd with that one as its reference.

The patch is a zstd frame (`zstd --patch-from` reads it) and needs the old file in memory to be decoded, with a window
over both. Nothing ships deltas yet; the gate can limit what they would cost.
"""

import zstandard

from qcore.release.package import COMPRESSION_LEVEL

SMALL_BYTES = 1 << 25
"""Above it a lower level is used: 19 takes most of a second per MB."""
LOWER_LEVEL = 9
MAX_WINDOW_LOG = 31


def encode_delta(old: bytes, new: bytes) -> bytes:
    """Return the patch that makes `new` of `old`; equal inputs give equal bytes with one version of zstd.

    Memory is bounded by about three times the two files and 700 MB, time by a second per MB of `new`.
    """
    level = COMPRESSION_LEVEL if max(len(old), len(new)) <= SMALL_BYTES else LOWER_LEVEL
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, source_size=len(new), window_log=_window_log(old, new), enable_ldm=True
    )
    compressor = zstandard.ZstdCompressor(dict_data=_reference(old), compression_params=parameters)
    return compressor.compress(new)


def apply_delta(old: bytes, delta: bytes) -> bytes:
    """Return what `delta` makes of `old`.

    Raises:
        zstandard.ZstdError: it was made for another file.
    """
    return zstandard.ZstdDecompressor(dict_data=_reference(old), max_window_size=1 << MAX_WINDOW_LOG).decompress(delta)


def delta_bytes(old: bytes, new: bytes) -> int:
    """Return the size of `encode_delta`, or of `new` compressed by itself where that is less."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        COMPRESSION_LEVEL if len(new) <= SMALL_BYTES else LOWER_LEVEL, source_size=len(new)
    )
    alone = len(zstandard.ZstdCompressor(compression_params=parameters).compress(new))
    return min(alone, len(encode_delta(old, new)))


def _reference(old: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def _window_log(old: bytes, new: bytes) -> int:
    """Return the smallest window that reaches from the end of `new` to the start of `old`."""
    return min(MAX_WINDOW_LOG, max(10, (len(old) + len(new)).bit_length()))
