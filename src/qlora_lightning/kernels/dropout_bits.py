"""``dropout.py``'s hash inside Triton kernels: the same bits, with the work that several masks share done once.

Shifts distribute over exclusive or, so the first step of the hash of (counter ^ key) is (counter ^ counter >> 16) ^ (key ^ key >> 16): the
first half is shared by every stream of a group, the second is a scalar. The hash's last step leaves the high half of a word as it is,
so only the mask that takes the low half pays for it.
"""

import triton
import triton.language as tl


@triton.jit
def _mix(word):  # type: ignore[no-untyped-def]
    word ^= word >> 16
    word *= 0x7FEB352D
    word ^= word >> 15
    word *= 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def stream_key(seed_pointer, stream):  # type: ignore[no-untyped-def]
    """``dropout.dropout_key`` after the hash's first step: a uint32 scalar for ``random_words``."""
    seed = tl.load(seed_pointer)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    key = _mix(low ^ _mix(high + stream.to(tl.uint32) * 0x9E3779B9))
    return key ^ (key >> 16)


@triton.jit
def first_step(entries):  # type: ignore[no-untyped-def]
    """What the streams of a group share of the hash of entry numbers (token * columns + column, uint32)."""
    return entries ^ (entries >> 16)


@triton.jit
def random_words(stepped, key):  # type: ignore[no-untyped-def]
    """The hash but for its last step, of ``first_step``'s result and ``stream_key``'s."""
    word = (stepped ^ key) * 0x7FEB352D
    word ^= word >> 15
    return word * 0x846CA68B


@triton.jit
def kept(words, HALF: tl.constexpr, THRESHOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which entries the mask keeps that takes the low (0) or the high half (1) of ``random_words``' result."""
    if HALF == 0:
        return ((words ^ (words >> 16)) & 0xFFFF) >= THRESHOLD
    else:
        return (words >> 16) >= THRESHOLD
