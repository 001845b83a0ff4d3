"""Choosing compiled shapes for a request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attntune.errors import InputError
from attntune.runtime.buckets import Bucket, Planner

BUCKETS = [
    Bucket((("batch", b), ("seq", s)), f"f_{b}_{s}", b * s + 3.0) for b in (1, 2, 4, 8) for s in (16, 64, 128)
]  # fmt: skip


@given(batch=st.integers(1, 40), seq=st.integers(1, 128))
def test_pieces_cover_the_batch_once_and_fit(batch, seq):
    pieces = Planner(BUCKETS).plan({"batch": batch, "seq": seq})
    assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(range(batch))
    for piece in pieces:
        assert piece.bucket["seq"] >= seq
        assert piece.stop - piece.start <= piece.bucket["batch"]


@given(batch=st.integers(1, 9), seq=st.integers(1, 128))
def test_no_cover_by_equal_buckets_is_cheaper(batch, seq):
    chosen = sum(piece.bucket.cost for piece in Planner(BUCKETS).plan({"batch": batch, "seq": seq}))
    for bucket in BUCKETS:
        if bucket["seq"] >= seq:
            assert chosen <= -(-batch // bucket["batch"]) * bucket.cost


def test_smallest_sufficient_length_is_taken():
    (piece,) = Planner(BUCKETS).plan({"batch": 2, "seq": 17})
    assert piece.bucket.function == "f_2_64"


def test_too_long_names_the_limit():
    with pytest.raises(InputError, match="at most 128 tokens, got 129"):
        Planner(BUCKETS).plan({"batch": 1, "seq": 129})
