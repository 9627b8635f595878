"""Deltas: what comes out is the new file, and a small change is a small download."""

import contextlib
import time

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore.release.delta import apply_delta, delta_bytes, encode_delta
from qcore.release.package import packed_size


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000), st.binary(max_size=3000), st.integers(0, 3000))
def test_the_new_file_comes_back(old, new, cut):
    for target in (new, old[:cut] + new + old[cut:], old):
        delta = encode_delta(old, target)
        assert apply_delta(old, delta) == target
        assert encode_delta(old, target) == delta


def noise(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8)


def test_a_change_in_the_middle_costs_what_it_is():
    old = noise(1 << 20)
    new = old.copy()
    new[500_000:501_000] = noise(1000, 1)
    assert delta_bytes(old.tobytes(), new.tobytes()) < 3000
    assert delta_bytes(old.tobytes(), old.tobytes()) < 300


def test_a_file_that_has_nothing_in_common_costs_no_more_than_itself():
    old, new = noise(1 << 18).tobytes(), (noise(1 << 18, 1) % 4).tobytes()
    assert delta_bytes(old, new) <= packed_size(new)


def test_a_delta_for_another_file_does_not_give_the_new_one():
    old, new = noise(1 << 16), noise(1 << 16)
    new[100:200] = 0
    delta = encode_delta(old.tobytes(), new.tobytes())
    with contextlib.suppress(zstandard.ZstdError):
        assert apply_delta(noise(1 << 16, 5).tobytes(), delta) != new.tobytes()


@pytest.mark.slow
def test_a_hundred_megabytes_are_done_in_bounded_time():
    old = noise(100 << 20)
    new = old.copy()
    new[::1000] = 0
    began = time.process_time()
    assert delta_bytes(old.tobytes(), new.tobytes()) < len(new)
    assert time.process_time() - began < 120
