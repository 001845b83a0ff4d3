"""One row for each operator: what the contract tests of ops and templates need to know of it.

A new operator adds one row to ROWS; everything in test_ops.py and test_templates.py then covers it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracles
from corners import CORNERS
from hypothesis import strategies as st

from attntune.ops import (
    AdditiveAttention,
    AddPositions,
    ArgMax,
    Attention,
    Embedding,
    EmbeddingNorm,
    GRUSequence,
    HeadNorm,
    KVAppend,
    LayerNorm,
    Linear,
    LSTMSequence,
    MeanPool,
    Patchify,
    PrependToken,
    RelativeBias,
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
_HEADS = {"heads": st.integers(1, 4), "kv_heads": st.integers(1, 3)}
_RECURRENT = {
    "batch": _FEW, "seq": _FEW, "hidden": st.integers(1, 70), "reverse": st.booleans(), "lengths": st.booleans(),
    "initial": st.booleans(), "bias": st.booleans(),
}  # fmt: skip

ROWS: dict[str, Row] = {
    "linear": Row(
        workloads=CORNERS["linear"],
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
        workloads=CORNERS["attention"],
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
            kv_layout=st.sampled_from(["", "bhsd"]),
            lengths=st.sampled_from(["", "kv"]),
        ),
        wrong=(
            {"heads": 0},
            {"kv_heads": 2},
            {"packed": True, "q_len": 3},
            {"bias_batch": 1},
            {"layout": "bhsd"},
            {"kv_layout": "bhsd"},
            {"kv_layout": "bsd"},
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
        workloads=CORNERS["layer_norm"],
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
        workloads=CORNERS["softmax"],
        oracle=oracles.softmax,
        call=({}, ((2, 3, 4, 17),), Softmax(24, 17)),
        drawn=st.builds(Softmax, rows=_SIZES, features=_SIZES),
        wrong=({"features": 0}, {"dtype": "float8"}),
    ),
    "embedding_norm": Row(
        workloads=CORNERS["embedding_norm"],
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
        workloads=CORNERS["mean_pool"],
        oracle=oracles.mean_pool,
        call=({"eps": 1e-9, "normalize": False}, ((2, 5, 17), (2, 5)), MeanPool(2, 5, 17, normalize=False)),
        drawn=st.builds(MeanPool, batch=_FEW, seq=_SIZES, features=_SIZES, normalize=st.booleans()),
        wrong=({"seq": True}, {"eps": 0.0}),
    ),
    "rms_norm": Row(
        workloads=CORNERS["rms_norm"],
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
        workloads=CORNERS["embedding"],
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
        workloads=CORNERS["select_rows"],
        oracle=oracles.select_rows,
        call=({}, ((2, 5, 17), (2,)), SelectRows(2, 5, 17)),
        drawn=st.builds(SelectRows, batch=_FEW, seq=_SIZES, features=_SIZES),
        wrong=({"seq": 0}, {"dtype": "int8"}, {"row": 7}),
    ),
    "patchify": Row(
        workloads=CORNERS["patchify"],
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
        workloads=CORNERS["unfold"],
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
        workloads=CORNERS["add_positions"],
        oracle=oracles.add_positions,
        call=({}, ((2, 7, 37), (9, 37)), AddPositions(2, 7, 37, positions=9)),
        drawn=st.builds(AddPositions, batch=st.integers(1, 3), seq=st.integers(1, 20), features=st.integers(1, 70)),
        wrong=({"positions": 3}, {"features": 0}, {"dtype": "int8"}),
    ),
    "relative_bias": Row(
        workloads=CORNERS["relative_bias"],
        oracle=oracles.relative_bias,
        call=(
            {"zero": 4, "lengths": True},
            ((2, 3), (4, 9), (2,), (2, 4, 20, 3)),
            RelativeBias(2, 3, 4, 9, 4, lengths=True, kv_len=20, head_dim=3),
        ),
        drawn=st.builds(
            RelativeBias,
            batch=st.integers(1, 3),
            q_len=_SIZES,
            heads=st.integers(1, 5),
            distances=st.integers(9, 90),
            zero=st.integers(0, 8),
        ),
        wrong=({"zero": -1}, {"distances": 3}, {"kv_len": 99}, {"head_dim": 7}, {"dtype": "int8"}),
    ),
    "prepend_token": Row(
        workloads=CORNERS["prepend_token"],
        oracle=oracles.prepend_token,
        call=({}, ((2, 7, 37), (37,), (8, 37)), PrependToken(2, 7, 37)),
        drawn=st.builds(PrependToken, batch=_FEW, seq=st.integers(1, 30), features=_SIZES),
        wrong=({"seq": 0}, {"dtype": "int8"}),
    ),
    "head_norm": Row(
        workloads=CORNERS["head_norm"],
        oracle=oracles.head_norm,
        call=(
            {"heads": 4, "kv_heads": 2, "head_dim": 16, "eps": 1e-6},
            ((2, 3, 128), (6, 16)),
            HeadNorm(6, 4, 2, 16),
        ),
        drawn=st.builds(
            HeadNorm,
            rows=st.integers(1, 20),
            **_HEADS,
            head_dim=st.integers(1, 80),
        ),
        wrong=({"heads": 0}, {"eps": 0.0}, {"dtype": "int64"}),
    ),
    "rope": Row(
        workloads=CORNERS["rope"],
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
            **_HEADS,
            head_dim=st.integers(1, 40).map(lambda n: 2 * n),
            positions=st.just(20),
            style=st.sampled_from(["half", "interleaved"]),
        ),
        wrong=({"head_dim": 15}, {"style": "full"}, {"seq": 10}),
    ),
    "kv_append": Row(
        workloads=CORNERS["kv_append"],
        oracle=oracles.kv_append,
        call=(
            {"heads": 4, "kv_heads": 2, "head_dim": 16, "style": "half"},
            ((2, 3, 128), (2,), (2, 2, 17, 16), (2, 2, 17, 16), (32, 8), (32, 8)),
            KVAppend(2, 3, 17, 4, 2, 16, style="half", positions=32),
        ),
        drawn=st.builds(
            KVAppend,
            batch=st.integers(1, 3),
            q_len=st.integers(1, 9),
            context=st.integers(1, 40),
            **_HEADS,
            head_dim=st.integers(1, 40).map(lambda n: 2 * n),
            positions=st.just(40),
            style=st.sampled_from(["half", "interleaved"]),
        ),
        wrong=({"context": 0}, {"style": ""}, {"positions": 0}, {"head_dim": 15}),
    ),
    "argmax": Row(
        workloads=CORNERS["argmax"],
        oracle=oracles.argmax,
        call=({}, ((2, 3, 17),), ArgMax(6, 17)),
        drawn=st.builds(ArgMax, rows=_SIZES, features=_SIZES),
        wrong=({"rows": 0}, {"dtype": "int8"}),
    ),
    "top_k": Row(
        workloads=CORNERS["top_k"],
        oracle=oracles.top_k,
        call=({"k": 4}, ((2, 3, 17),), TopK(6, 17, 4)),
        drawn=st.builds(TopK, rows=_FEW, features=st.integers(9, 150), k=_FEW),
        wrong=({"k": 38}, {"k": 0}, {"dtype": "int8"}),
    ),
    "gru_sequence": Row(
        workloads=CORNERS["gru_sequence"],
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
        workloads=CORNERS["lstm_sequence"],
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
        workloads=CORNERS["additive_attention"],
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
