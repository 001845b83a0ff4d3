"""One row for each operator: what the contract tests of ops and templates need to know of it.

A new operator adds one row to ROWS; everything in test_ops.py and test_templates.py then covers it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracles
from hypothesis import strategies as st

from attntune.ops import (
    AdditiveAttention,
    AddPositions,
    ArgMax,
    Attention,
    Embedding,
    EmbeddingNorm,
    GRUSequence,
    KVAppend,
    LayerNorm,
    Linear,
    LSTMSequence,
    MeanPool,
    Patchify,
    PrependToken,
    RMSNorm,
    Rope,
    SelectRows,
    Softmax,
    TensorSpec,
    TopK,
    Unfold,
    Workload,
)


@dataclass(frozen=True)
class Row:
    """Workloads that are small and odd, an oracle that is not ours, and a model's call."""

    workloads: tuple[Workload, ...]
    """Every variant; sizes of 1, primes, and sizes that no vector or tile divides."""
    oracle: Callable[..., np.ndarray]
    """``oracle(workload, *float64 torch tensors)`` by torch alone."""
    call: tuple[dict[str, Any], tuple[tuple[int, ...], ...], Workload]
    """Attributes and argument shapes of a call with leading dimensions, and the workload it must give."""
    drawn: st.SearchStrategy[Workload]
    """Shapes for property tests."""
    wrong: tuple[dict[str, Any], ...]
    """Fields that contradict themselves when put into the first workload."""


_SIZES = st.one_of(st.integers(1, 40), st.sampled_from([47, 61, 64, 96, 100, 127, 128, 131]))
_FEW = st.integers(1, 9)
_RECURRENT = {
    "batch": _FEW, "seq": _FEW, "hidden": st.integers(1, 70), "reverse": st.booleans(), "lengths": st.booleans(),
    "initial": st.booleans(), "bias": st.booleans(),
}  # fmt: skip

ROWS: dict[str, Row] = {
    "linear": Row(
        workloads=(
            Linear(5, 17, 33, activation="gelu", residual=True),
            Linear(1, 1, 1),
            Linear(13, 31, 47, bias=False, activation="relu"),
            Linear(7, 64, 96, activation="gelu_tanh"),
            Linear(19, 40, 65, activation="silu", bias=False, residual=True),
            Linear(33, 24, 7),
            Linear(64, 48, 128),
            Linear(6, 30, 41, activation="silu", gated=True, residual=True),
            Linear(9, 34, 48, bias=False, gated=True),
            Linear(11, 38, 35, activation="gelu", residual=True, dtype="bfloat16"),
            Linear(1, 64, 96, bias=False, dtype="bfloat16", out_dtype="float32"),
            Linear(5, 16, 40, activation="silu", gated=True, dtype="bfloat16"),
            Linear(7, 45, 50, activation="relu", residual=True, weight_dtype="int8"),
            Linear(1, 64, 33, activation="gelu_tanh", gated=True, weight_dtype="int8"),
            Linear(18, 40, 64, dtype="bfloat16", weight_dtype="int8"),
            Linear(9, 150, 40, weight_dtype="int8"),
            Linear(5, 128, 48, bias=False, dtype="bfloat16", weight_dtype="int8"),
            Linear(51, 24, 48, activation="gelu", residual=True, seq=17),
            Linear(40, 19, 37, seq=10),
            Linear(34, 24, 32, activation="silu", gated=True, bias=False, seq=17),
            Linear(39, 32, 48, residual=True, dtype="bfloat16", seq=13),
            Linear(24, 40, 33, activation="gelu", dtype="bfloat16", weight_dtype="int8", seq=8),
        ),
        oracle=oracles.linear,
        call=(
            {"bias": True, "activation": "gelu", "residual": True},
            ((2, 3, 17), (33, 17), (33,), (2, 3, 33)),
            Linear(6, 17, 33, activation="gelu", residual=True),
        ),
        drawn=st.builds(
            Linear,
            rows=_SIZES,
            in_features=_SIZES,
            out_features=_SIZES,
            bias=st.booleans(),
            activation=st.sampled_from(["", "gelu"]),
            residual=st.booleans(),
        ),
        wrong=({"rows": 0}, {"activation": "swish"}, {"dtype": "int8"}, {"in_features": 2.5}, {"rows": 5, "seq": 2}),
    ),
    "attention": Row(
        workloads=(
            Attention(2, 3, 17, 17, 32, packed=True, mask=True),
            Attention(1, 1, 1, 1, 1),
            Attention(1, 4, 5, 29, 8, kv_heads=2, mask=True),
            Attention(3, 2, 33, 33, 16, packed=True, causal=True, mask=True),
            Attention(2, 2, 7, 31, 20, causal=True, causal_offset=24),
            Attention(1, 2, 19, 13, 80, bias_batch=1, bias_heads=2, scale=0.25),
            Attention(2, 2, 23, 70, 96, bias_batch=2, bias_heads=1, mask=True),
            Attention(1, 2, 9, 4, 17, causal=True),
            Attention(2, 4, 37, 53, 24, kv_heads=2, layout="bhsd", causal=True, causal_offset=16, window=11),
            Attention(2, 2, 21, 45, 16, layout="bhsd", softcap=3.0, bias_batch=2, bias_heads=1, bias_q=1),
            Attention(1, 3, 35, 35, 32, causal=True, alibi=True, weights=True),
            Attention(2, 2, 9, 70, 64, layout="bhsd", mask=True, weights=True),
            Attention(3, 2, 67, 67, 16, packed=True, lengths="qkv", causal=True),
            Attention(3, 4, 1, 150, 64, kv_heads=2, lengths="kv"),
            Attention(2, 6, 3, 131, 40, kv_heads=2, layout="bhsd", lengths="kv", causal=True, alibi=True, window=70),
            Attention(2, 2, 7, 33, 8, score_mod="oracles:halve_far_scores", causal=True),
            Attention(4, 2, 131, 131, 16, packed=True, ragged=True),
            Attention(2, 2, 15, 15, 8, ragged=True, causal=True, window=9, score_mod="oracles:halve_far_scores"),
        ),
        oracle=oracles.attention,
        call=(
            {
                "heads": 4,
                "kv_heads": 2,
                "head_dim": 8,
                "packed": False,
                "causal": True,
                "mask": True,
                "bias": True,
                "scale": None,
            },
            ((2, 5, 32), (2, 7, 16), (2, 7, 16), (2, 7), (1, 4, 5, 7)),
            Attention(2, 4, 5, 7, 8, kv_heads=2, causal=True, mask=True, bias_batch=1, bias_heads=4),
        ),
        drawn=st.builds(
            Attention,
            batch=st.integers(1, 3),
            heads=st.integers(1, 3),
            q_len=st.integers(1, 70),
            kv_len=st.integers(1, 140),
            head_dim=st.sampled_from([1, 8, 17, 32, 64, 80]),
            mask=st.booleans(),
            causal=st.booleans(),
            layout=st.sampled_from(["bshd", "bhsd"]),
            lengths=st.sampled_from(["", "kv"]),
        ),
        wrong=(
            {"heads": 0},
            {"kv_heads": 2},
            {"packed": True, "q_len": 3},
            {"bias_batch": 1},
            {"layout": "bhsd"},
            {"window": 4},
            {"window": -1, "causal": True},
            {"softcap": -1.0},
            {"lengths": "q"},
            {"ragged": True, "mask": True},
            {"score_mod": "nowhere"},
            {"bias_q": 1},
        ),
    ),
    "layer_norm": Row(
        workloads=(
            LayerNorm(7, 37, residual=True),
            LayerNorm(1, 1),
            LayerNorm(5, 131, eps=1e-5),
            LayerNorm(64, 48, residual=True),
            LayerNorm(3, 15),
            LayerNorm(2, 384),
            LayerNorm(6, 1000, residual=True),
            LayerNorm(51, 48, residual=True, seq=17),
            LayerNorm(20, 37, seq=10),
        ),
        oracle=oracles.layer_norm,
        call=(
            {"eps": 1e-12, "residual": True},
            ((2, 3, 17), (2, 3, 17), (17,), (17,)),
            LayerNorm(6, 17, residual=True),
        ),
        drawn=st.builds(LayerNorm, rows=_SIZES, features=_SIZES, residual=st.booleans(), eps=st.just(1e-5)),
        wrong=({"rows": -1}, {"eps": 0.0}, {"dtype": "int64"}, {"rows": 5, "seq": 2}),
    ),
    "softmax": Row(
        workloads=(
            Softmax(5, 37),
            Softmax(1, 1),
            Softmax(64, 128),
            Softmax(3, 15),
            Softmax(7, 1021),
            Softmax(2, 2),
        ),
        oracle=oracles.softmax,
        call=({}, ((2, 3, 4, 17),), Softmax(24, 17)),
        drawn=st.builds(Softmax, rows=_SIZES, features=_SIZES),
        wrong=({"features": 0}, {"dtype": "float8"}),
    ),
    "embedding_norm": Row(
        workloads=(
            EmbeddingNorm(2, 7, 50, 11, 2, 37),
            EmbeddingNorm(1, 1, 1, 1, 1, 1),
            EmbeddingNorm(3, 5, 101, 5, 1, 64),
            EmbeddingNorm(1, 16, 30, 64, 2, 131, eps=1e-5),
        ),
        oracle=oracles.embedding_norm,
        call=(
            {"eps": 1e-12},
            ((2, 7), (2, 7), (50, 37), (11, 37), (2, 37), (37,), (37,)),
            EmbeddingNorm(2, 7, 50, 11, 2, 37),
        ),
        drawn=st.builds(
            EmbeddingNorm,
            batch=_FEW,
            seq=st.integers(1, 30),
            vocab=_SIZES,
            positions=st.just(30),
            types=_FEW,
            features=_SIZES,
            eps=st.just(1e-5),
        ),
        wrong=({"seq": 12}, {"eps": -1.0}, {"types": 0}),
    ),
    "mean_pool": Row(
        workloads=(
            MeanPool(3, 7, 37),
            MeanPool(1, 1, 1),
            MeanPool(4, 13, 96),
            MeanPool(2, 31, 385),
            MeanPool(5, 8, 15, normalize=False),
        ),
        oracle=oracles.mean_pool,
        call=({"eps": 1e-9, "normalize": False}, ((2, 5, 17), (2, 5)), MeanPool(2, 5, 17, normalize=False)),
        drawn=st.builds(MeanPool, batch=_FEW, seq=_SIZES, features=_SIZES, normalize=st.booleans()),
        wrong=({"seq": True}, {"eps": 0.0}),
    ),
    "rms_norm": Row(
        workloads=(
            RMSNorm(7, 37, residual=True),
            RMSNorm(1, 1),
            RMSNorm(5, 131, eps=1e-6),
            RMSNorm(64, 48),
            RMSNorm(2, 576),
            RMSNorm(6, 1000, residual=True),
            RMSNorm(3, 96, dtype="bfloat16"),
            RMSNorm(3, 41, dtype="bfloat16", out_dtype="float32"),
        ),
        oracle=oracles.rms_norm,
        call=(
            {"eps": 1e-5, "residual": True},
            ((2, 3, 17), (2, 3, 17), (17,)),
            RMSNorm(6, 17, residual=True),
        ),
        drawn=st.builds(RMSNorm, rows=_SIZES, features=_SIZES, residual=st.booleans()),
        wrong=({"rows": -1}, {"eps": 0.0}, {"dtype": "int64"}),
    ),
    "embedding": Row(
        workloads=(
            Embedding(2, 7, 50, 37, positions=11),
            Embedding(1, 1, 1, 1),
            Embedding(3, 5, 101, 64, scale=8.0),
            Embedding(2, 16, 30, 131, positions=20, position_offset=2, scale=0.5),
            Embedding(3, 4, 30, 48, positions=33, lengths=True),
            Embedding(2, 1, 30, 96, positions=33, lengths=True, position_offset=2),
            Embedding(2, 5, 19, 43, positions=7, dtype="bfloat16"),
            Embedding(2, 5, 19, 32, dtype="bfloat16", out_dtype="float32"),
        ),
        oracle=oracles.embedding,
        call=(
            {"scale": 2.0, "position": True, "lengths": True, "position_offset": 2},
            ((2, 7), (50, 37), (21, 37), (2,)),
            Embedding(2, 7, 50, 37, positions=21, lengths=True, position_offset=2, scale=2.0),
        ),
        drawn=st.builds(
            Embedding, batch=_FEW, seq=st.integers(1, 30), vocab=_SIZES, features=_SIZES, positions=st.just(30)
        ),
        wrong=({"vocab": 0}, {"positions": -1}, {"positions": 0, "lengths": True}, {"position_offset": -1}),
    ),
    "select_rows": Row(
        workloads=(
            SelectRows(3, 7, 37, dtype="bfloat16", out_dtype="float32"),
            SelectRows(1, 1, 1),
            SelectRows(4, 13, 96),
            SelectRows(3, 5, 35),
            SelectRows(2, 5, 131, dtype="bfloat16"),
            SelectRows(2, 5, 33, dtype="bfloat16", out_dtype="float32"),
            SelectRows(3, 7, 37, row=0),
            SelectRows(2, 5, 33, row=4, dtype="bfloat16"),
        ),
        oracle=oracles.select_rows,
        call=({}, ((2, 5, 17), (2,)), SelectRows(2, 5, 17)),
        drawn=st.builds(SelectRows, batch=_FEW, seq=_SIZES, features=_SIZES),
        wrong=({"seq": 0}, {"dtype": "int8"}, {"row": 7}),
    ),
    "patchify": Row(
        workloads=(
            Patchify(2, 3, 12, 20, 4),
            Patchify(1, 1, 1, 1, 1),
            Patchify(3, 1, 8, 8, 2),
            Patchify(1, 3, 32, 48, 16),
            Patchify(2, 2, 14, 21, 7, out_dtype="bfloat16"),
            Patchify(1, 3, 8, 8, 8, dtype="bfloat16"),
        ),
        oracle=oracles.patchify,
        call=({"patch": 4}, ((2, 3, 12, 20),), Patchify(2, 3, 12, 20, 4)),
        drawn=st.builds(
            lambda down, across, patch, **kw: Patchify(height=down * patch, width=across * patch, patch=patch, **kw),
            batch=st.integers(1, 3),
            channels=st.integers(1, 4),
            down=st.integers(1, 4),
            across=st.integers(1, 4),
            patch=st.integers(1, 17),
        ),
        wrong=({"height": 13}, {"patch": 0}, {"dtype": "int8"}),
    ),
    "unfold": Row(
        workloads=(
            Unfold(2, 13, 37, 3, 2, 1),
            Unfold(1, 1, 1, 1),
            Unfold(2, 30, 20, 3, 1, 1, layout="bcl"),
            Unfold(1, 9, 64, 5, 3, 2, dtype="bfloat16"),
            Unfold(1, 11, 33, 3, 1, 1, layout="bcl", out_dtype="bfloat16"),
        ),
        oracle=oracles.unfold,
        call=(
            {"kernel": 3, "stride": 2, "padding": 1, "layout": "bcl"},
            ((2, 20, 31),),
            Unfold(2, 31, 20, 3, 2, 1, layout="bcl"),
        ),
        drawn=st.builds(
            Unfold,
            batch=st.integers(1, 3),
            length=st.integers(5, 20),
            channels=st.integers(1, 40),
            kernel=st.integers(1, 5),
            stride=st.integers(1, 3),
            padding=st.integers(0, 2),
            layout=st.sampled_from(("blc", "bcl")),
        ),
        wrong=({"kernel": 16}, {"stride": 0}, {"padding": -1}, {"layout": "lbc"}),
    ),
    "add_positions": Row(
        workloads=(
            AddPositions(2, 7, 37),
            AddPositions(1, 1, 1),
            AddPositions(3, 5, 64, positions=9),
            AddPositions(1, 6, 33, dtype="bfloat16", out_dtype="float32"),
        ),
        oracle=oracles.add_positions,
        call=({}, ((2, 7, 37), (9, 37)), AddPositions(2, 7, 37, positions=9)),
        drawn=st.builds(AddPositions, batch=st.integers(1, 3), seq=st.integers(1, 20), features=st.integers(1, 70)),
        wrong=({"positions": 3}, {"features": 0}, {"dtype": "int8"}),
    ),
    "prepend_token": Row(
        workloads=(
            PrependToken(2, 7, 37),
            PrependToken(1, 1, 1),
            PrependToken(3, 4, 96),
            PrependToken(2, 5, 33, dtype="bfloat16"),
            PrependToken(1, 5, 64, dtype="bfloat16", out_dtype="float32"),
        ),
        oracle=oracles.prepend_token,
        call=({}, ((2, 7, 37), (37,), (8, 37)), PrependToken(2, 7, 37)),
        drawn=st.builds(PrependToken, batch=_FEW, seq=st.integers(1, 30), features=_SIZES),
        wrong=({"seq": 0}, {"dtype": "int8"}),
    ),
    "rope": Row(
        workloads=(
            Rope(2, 7, 4, 2, 16, 9),
            Rope(1, 1, 1, 1, 2, 1),
            Rope(2, 5, 3, 1, 64, 5),
            Rope(2, 5, 3, 3, 64, 8, style="interleaved"),
            Rope(1, 9, 2, 1, 46, 32, style="interleaved"),
            Rope(1, 6, 2, 2, 70, 11),
            Rope(2, 5, 3, 1, 64, 5, dtype="bfloat16"),
            Rope(2, 5, 2, 1, 40, 5, style="interleaved", dtype="bfloat16"),
        ),
        oracle=oracles.rope,
        call=(
            {"heads": 4, "kv_heads": 2, "head_dim": 16, "style": "half"},
            ((2, 7, 128), (9, 8), (9, 8)),
            Rope(2, 7, 4, 2, 16, 9),
        ),
        drawn=st.builds(
            Rope,
            batch=st.integers(1, 3),
            seq=st.integers(1, 20),
            heads=st.integers(1, 4),
            kv_heads=st.integers(1, 3),
            head_dim=st.integers(1, 40).map(lambda n: 2 * n),
            positions=st.just(20),
            style=st.sampled_from(["half", "interleaved"]),
        ),
        wrong=({"head_dim": 15}, {"style": "full"}, {"seq": 10}),
    ),
    "kv_append": Row(
        workloads=(
            KVAppend(2, 3, 17, 4, 2, 16, style="half", positions=32),
            KVAppend(1, 1, 1, 1, 1, 1),
            KVAppend(3, 1, 40, 3, 1, 64, style="interleaved", positions=64),
            KVAppend(3, 6, 12, 2, 2, 46, style="half", positions=10),
            KVAppend(2, 5, 9, 3, 3, 37),
            KVAppend(2, 4, 33, 3, 1, 64, style="half", positions=64, dtype="bfloat16"),
            KVAppend(2, 1, 8, 2, 2, 24, dtype="bfloat16"),
        ),
        oracle=oracles.kv_append,
        call=(
            {"heads": 4, "kv_heads": 2, "head_dim": 16, "style": "half"},
            ((2, 3, 128), (2,), (2, 17, 32), (2, 17, 32), (32, 8), (32, 8)),
            KVAppend(2, 3, 17, 4, 2, 16, style="half", positions=32),
        ),
        drawn=st.builds(
            KVAppend,
            batch=st.integers(1, 3),
            q_len=st.integers(1, 9),
            context=st.integers(1, 40),
            heads=st.integers(1, 4),
            kv_heads=st.integers(1, 3),
            head_dim=st.integers(1, 40).map(lambda n: 2 * n),
            positions=st.just(40),
            style=st.sampled_from(["half", "interleaved"]),
        ),
        wrong=({"context": 0}, {"style": ""}, {"positions": 0}, {"head_dim": 15}),
    ),
    "argmax": Row(
        workloads=(
            ArgMax(5, 37),
            ArgMax(1, 1),
            ArgMax(3, 1021),
            ArgMax(2, 128),
            ArgMax(3, 61, dtype="bfloat16"),
        ),
        oracle=oracles.argmax,
        call=({}, ((2, 3, 17),), ArgMax(6, 17)),
        drawn=st.builds(ArgMax, rows=_SIZES, features=_SIZES),
        wrong=({"rows": 0}, {"dtype": "int8"}),
    ),
    "top_k": Row(
        workloads=(
            TopK(5, 37, 4),
            TopK(1, 1, 1),
            TopK(3, 521, 50),
            TopK(2, 128, 128),
            TopK(3, 61, 7, dtype="bfloat16"),
        ),
        oracle=oracles.top_k,
        call=({"k": 4}, ((2, 3, 17),), TopK(6, 17, 4)),
        drawn=st.builds(TopK, rows=_FEW, features=st.integers(9, 150), k=_FEW),
        wrong=({"k": 38}, {"k": 0}, {"dtype": "int8"}),
    ),
    "gru_sequence": Row(
        workloads=(
            GRUSequence(3, 5, 17, lengths=True, initial=True),
            GRUSequence(1, 1, 1),
            GRUSequence(1, 7, 64, initial=True),
            GRUSequence(5, 4, 33, reverse=True, lengths=True, bias=False),
            GRUSequence(2, 3, 48, reverse=True),
        ),
        oracle=oracles.recurrent,
        call=(
            {"reverse": True, "lengths": True, "initial": True, "bias": True},
            ((2, 5, 51), (51, 17), (51,), (2, 17), (2,)),
            GRUSequence(2, 5, 17, reverse=True, lengths=True, initial=True),
        ),
        drawn=st.builds(GRUSequence, **_RECURRENT),
        wrong=({"seq": 0}, {"hidden": -1}, {"dtype": "int8"}),
    ),
    "lstm_sequence": Row(
        workloads=(
            LSTMSequence(3, 5, 19, lengths=True, initial=True),
            LSTMSequence(1, 1, 1),
            LSTMSequence(4, 6, 32, reverse=True, lengths=True, bias=False),
            LSTMSequence(2, 3, 50, initial=True, reverse=True),
        ),
        oracle=oracles.recurrent,
        call=(
            {"initial": True, "bias": True},
            ((2, 68), (68, 17), (68,), (2, 17), (2, 17)),
            LSTMSequence(2, 1, 17, initial=True),
        ),
        drawn=st.builds(LSTMSequence, **_RECURRENT),
        wrong=({"batch": 0}, {"hidden": 1.5}, {"dtype": "float8"}),
    ),
    "additive_attention": Row(
        workloads=(
            AdditiveAttention(3, 2, 11, 17, 37, lengths=True),
            AdditiveAttention(1, 1, 1, 1, 1, scale=False),
            AdditiveAttention(2, 3, 25, 64, 64),
            AdditiveAttention(4, 1, 40, 47, 100, mask=True, lengths=True),
            AdditiveAttention(2, 5, 6, 16, 150, scale=False, mask=True),
        ),
        oracle=oracles.additive_attention,
        call=(
            {"scale": True, "lengths": True},
            ((2, 17), (2, 5, 17), (2, 5, 9), (17,), (2,)),
            AdditiveAttention(2, 1, 5, 17, 9, lengths=True),
        ),
        drawn=st.builds(
            AdditiveAttention,
            batch=_FEW,
            q_len=_FEW,
            kv_len=st.integers(1, 40),
            dim=_SIZES,
            features=_SIZES,
            scale=st.booleans(),
            mask=st.booleans(),
            lengths=st.booleans(),
        ),
        wrong=({"q_len": 0}, {"dim": True}, {"dtype": "int64"}),
    ),
}

#: Every workload of every row, with a readable id.
WORKLOADS = [workload for row in ROWS.values() for workload in row.workloads]


def call_arguments(op: str) -> tuple[dict[str, Any], list[TensorSpec], Workload]:
    """The row's call, its arguments as specs with the dtypes of the workload it must give."""
    attrs, shapes, expected = ROWS[op].call
    dtypes = [spec.dtype for spec in expected.inputs()]
    return attrs, [TensorSpec(f"arg{i}", s, d) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))], expected
