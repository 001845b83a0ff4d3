"""Workloads that are small and odd: every variant of every operator; sizes of 1, primes, and sizes no tile divides.

Needs neither a compiler nor what tests need, so that scripts/gpu_check can check the same workloads on a GPU.
"""

from __future__ import annotations

import contextlib

from attntune.errors import WorkloadError
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
    TopK,
    Unfold,
    Workload,
)
from attntune.templates import REGISTRY

CORNERS: dict[str, tuple[Workload, ...]] = {
    "linear": (
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
        Linear(1, 64, 33, activation="silu", gated=True, weight_dtype="uint4"),
        Linear(9, 150, 40, activation="gelu", residual=True, weight_dtype="uint4"),
        Linear(3, 37, 96, bias=False, weight_dtype="uint4"),
        Linear(1, 96, 50, bias=False, weight_dtype="uint8"),
        Linear(19, 50, 33, activation="relu", weight_dtype="uint8"),
        Linear(1, 150, 40, weight_dtype="uint4"),
        Linear(1, 83, 33, gated=True, activation="silu", weight_dtype="uint8"),
        Linear(24, 40, 33, activation="gelu", weight_dtype="uint4", seq=8),
        Linear(1, 150, 40, weight_dtype="uint4", x_dtype="int8"),
        Linear(9, 37, 96, activation="gelu", residual=True, weight_dtype="uint4", x_dtype="int8"),
        Linear(5, 64, 33, activation="silu", gated=True, bias=False, weight_dtype="uint4", x_dtype="int8"),
        Linear(19, 83, 50, weight_dtype="uint8", x_dtype="int8"),
        Linear(24, 40, 33, activation="gelu", weight_dtype="uint4", x_dtype="int8", seq=8),
        Linear(51, 24, 48, activation="gelu", residual=True, seq=17),
        Linear(40, 19, 37, seq=10),
        Linear(34, 24, 32, activation="silu", gated=True, bias=False, seq=17),
        Linear(39, 32, 48, residual=True, dtype="bfloat16", seq=13),
        Linear(24, 40, 33, activation="gelu", dtype="bfloat16", weight_dtype="int8", seq=8),
    ),
    "attention": (
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
        Attention(1, 6, 1, 90, 64, kv_heads=2, layout="bhsd", lengths="kv"),
        Attention(2, 2, 7, 33, 8, score_mod="oracles:halve_far_scores", causal=True),
        Attention(3, 4, 19, 70, 24, kv_heads=2, kv_layout="bhsd", lengths="kv", causal=True),
        Attention(2, 6, 2, 75, 64, kv_heads=2, kv_layout="bhsd", lengths="kv", causal=True),
        Attention(4, 2, 131, 131, 16, packed=True, ragged=True),
        Attention(2, 2, 15, 15, 8, ragged=True, causal=True, window=9, score_mod="oracles:halve_far_scores"),
        Attention(2, 8, 1, 50, 24, kv_heads=1),
    ),
    "layer_norm": (
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
    "softmax": (
        Softmax(5, 37),
        Softmax(1, 1),
        Softmax(64, 128),
        Softmax(3, 15),
        Softmax(7, 1021),
        Softmax(2, 2),
    ),
    "embedding_norm": (
        EmbeddingNorm(2, 7, 50, 11, 2, 37),
        EmbeddingNorm(1, 1, 1, 1, 1, 1),
        EmbeddingNorm(3, 5, 101, 5, 1, 64),
        EmbeddingNorm(1, 16, 30, 64, 2, 131, eps=1e-5),
    ),
    "mean_pool": (
        MeanPool(3, 7, 37),
        MeanPool(1, 1, 1),
        MeanPool(4, 13, 96),
        MeanPool(2, 31, 385),
        MeanPool(5, 8, 15, normalize=False),
    ),
    "rms_norm": (
        RMSNorm(7, 37, residual=True),
        RMSNorm(1, 1),
        RMSNorm(5, 131, eps=1e-6),
        RMSNorm(64, 48),
        RMSNorm(2, 576),
        RMSNorm(6, 1000, residual=True),
        RMSNorm(3, 96, dtype="bfloat16"),
        RMSNorm(3, 41, dtype="bfloat16", out_dtype="float32"),
    ),
    "embedding": (
        Embedding(2, 7, 50, 37, positions=11),
        Embedding(1, 1, 1, 1),
        Embedding(3, 5, 101, 64, scale=8.0),
        Embedding(2, 16, 30, 131, positions=20, position_offset=2, scale=0.5),
        Embedding(3, 4, 30, 48, positions=33, lengths=True),
        Embedding(2, 1, 30, 96, positions=33, lengths=True, position_offset=2),
        Embedding(2, 5, 19, 43, positions=7, dtype="bfloat16"),
        Embedding(2, 5, 19, 32, dtype="bfloat16", out_dtype="float32"),
        Embedding(2, 7, 50, 37, positions=11, weight_dtype="uint8"),
        Embedding(3, 5, 101, 64, scale=8.0, weight_dtype="uint4"),
        Embedding(3, 4, 30, 45, positions=33, lengths=True, weight_dtype="uint4"),
        Embedding(1, 1, 1, 1, weight_dtype="uint8"),
    ),
    "select_rows": (
        SelectRows(3, 7, 37, dtype="bfloat16", out_dtype="float32"),
        SelectRows(1, 1, 1),
        SelectRows(4, 13, 96),
        SelectRows(3, 5, 35),
        SelectRows(2, 5, 131, dtype="bfloat16"),
        SelectRows(2, 5, 33, dtype="bfloat16", out_dtype="float32"),
        SelectRows(3, 7, 37, row=0),
        SelectRows(2, 5, 33, row=4, dtype="bfloat16"),
    ),
    "patchify": (
        Patchify(2, 3, 12, 20, 4),
        Patchify(1, 1, 1, 1, 1),
        Patchify(3, 1, 8, 8, 2),
        Patchify(1, 3, 32, 48, 16),
        Patchify(2, 2, 14, 21, 7, out_dtype="bfloat16"),
        Patchify(1, 3, 8, 8, 8, dtype="bfloat16"),
    ),
    "unfold": (
        Unfold(2, 13, 37, 3, 2, 1),
        Unfold(1, 1, 1, 1),
        Unfold(2, 30, 20, 3, 1, 1, layout="bcl"),
        Unfold(1, 9, 64, 5, 3, 2, dtype="bfloat16"),
        Unfold(1, 11, 33, 3, 1, 1, layout="bcl", out_dtype="bfloat16"),
    ),
    "add_positions": (
        AddPositions(2, 7, 37),
        AddPositions(1, 1, 1),
        AddPositions(3, 5, 64, positions=9),
        AddPositions(1, 6, 33, dtype="bfloat16", out_dtype="float32"),
    ),
    "relative_bias": (
        RelativeBias(2, 37, 3, 17, 8),
        RelativeBias(1, 1, 1, 1, 0),
        RelativeBias(1, 70, 2, 33, 32),
        RelativeBias(1, 20, 2, 61, 0),
        RelativeBias(3, 1, 4, 33, 32, lengths=True, kv_len=50, head_dim=8),
        RelativeBias(2, 5, 3, 21, 20, lengths=True, kv_len=40, head_dim=6),
        RelativeBias(1, 40, 3, 17, 8, dtype="bfloat16"),
    ),
    "prepend_token": (
        PrependToken(2, 7, 37),
        PrependToken(1, 1, 1),
        PrependToken(3, 4, 96),
        PrependToken(2, 5, 33, dtype="bfloat16"),
        PrependToken(1, 5, 64, dtype="bfloat16", out_dtype="float32"),
    ),
    "head_norm": (
        HeadNorm(6, 4, 2, 16),
        HeadNorm(1, 1, 1, 1),
        HeadNorm(5, 3, 1, 37, eps=1e-5),
        HeadNorm(7, 3, 3, 80),
        HeadNorm(3, 16, 8, 128),
        HeadNorm(3, 4, 2, 64, dtype="bfloat16"),
        HeadNorm(2, 2, 1, 41, dtype="bfloat16"),
    ),
    "rope": (
        Rope(2, 7, 4, 2, 16, 9),
        Rope(1, 1, 1, 1, 2, 1),
        Rope(2, 5, 3, 1, 64, 5),
        Rope(2, 5, 3, 3, 64, 8, style="interleaved"),
        Rope(1, 9, 2, 1, 46, 32, style="interleaved"),
        Rope(1, 6, 2, 2, 70, 11),
        Rope(2, 5, 3, 1, 64, 5, dtype="bfloat16"),
        Rope(2, 5, 2, 1, 40, 5, style="interleaved", dtype="bfloat16"),
    ),
    "kv_append": (
        KVAppend(2, 3, 17, 4, 2, 16, style="half", positions=32),
        KVAppend(1, 1, 1, 1, 1, 1),
        KVAppend(3, 1, 40, 3, 1, 64, style="interleaved", positions=64),
        KVAppend(3, 6, 12, 2, 2, 46, style="half", positions=10),
        KVAppend(2, 5, 9, 3, 3, 37),
        KVAppend(2, 4, 33, 3, 1, 64, style="half", positions=64, dtype="bfloat16"),
        KVAppend(2, 1, 8, 2, 2, 24, dtype="bfloat16"),
    ),
    "argmax": (
        ArgMax(5, 37),
        ArgMax(1, 1),
        ArgMax(3, 1021),
        ArgMax(2, 128),
        ArgMax(3, 61, dtype="bfloat16"),
    ),
    "top_k": (
        TopK(5, 37, 4),
        TopK(1, 1, 1),
        TopK(3, 521, 50),
        TopK(2, 128, 128),
        TopK(3, 61, 7, dtype="bfloat16"),
    ),
    "gru_sequence": (
        GRUSequence(3, 5, 17, lengths=True, initial=True),
        GRUSequence(1, 1, 1),
        GRUSequence(1, 7, 64, initial=True),
        GRUSequence(5, 4, 33, reverse=True, lengths=True, bias=False),
        GRUSequence(2, 3, 48, reverse=True),
    ),
    "lstm_sequence": (
        LSTMSequence(3, 5, 19, lengths=True, initial=True),
        LSTMSequence(1, 1, 1),
        LSTMSequence(4, 6, 32, reverse=True, lengths=True, bias=False),
        LSTMSequence(2, 3, 50, initial=True, reverse=True),
    ),
    "additive_attention": (
        AdditiveAttention(3, 2, 11, 17, 37, lengths=True),
        AdditiveAttention(1, 1, 1, 1, 1, scale=False),
        AdditiveAttention(2, 3, 25, 64, 64),
        AdditiveAttention(4, 1, 40, 47, 100, mask=True, lengths=True),
        AdditiveAttention(2, 5, 6, 16, 150, scale=False, mask=True),
    ),
}

#: For tensor cores: edges in every direction, one slice and many, every epilogue, odd widths, few rows.
LINEARS = (
    Linear(100, 96, 80, dtype="bfloat16", activation="gelu", residual=True),
    Linear(64, 264, 64, dtype="float16", bias=False),
    Linear(70, 136, 75, dtype="float16", activation="gelu_tanh", residual=True),
    Linear(33, 72, 48, dtype="bfloat16", gated=True, activation="silu", residual=True),
    Linear(1, 200, 130, dtype="bfloat16", out_dtype="float32"),
)

#: For tensor cores: layouts, masks, windows, grouped heads, lengths, biases; sizes that no tile divides, rows without
#: keys.
ATTENTIONS = (
    Attention(1, 2, 70, 70, 32, dtype="bfloat16"),
    Attention(1, 2, 40, 72, 64, dtype="float16", layout="bhsd", causal=True, causal_offset=32),
    Attention(2, 2, 33, 33, 16, dtype="bfloat16", packed=True, causal=True, mask=True),
    Attention(1, 4, 50, 50, 48, kv_heads=2, dtype="float16", causal=True, window=11, alibi=True),
    Attention(2, 2, 17, 45, 96, dtype="bfloat16", layout="bhsd", softcap=3.0, bias_batch=2, bias_heads=1),
    Attention(2, 2, 5, 90, 32, kv_heads=1, dtype="float16", lengths="kv", causal=True),
    Attention(2, 2, 40, 40, 32, packed=True, dtype="bfloat16", lengths="qkv"),
    Attention(2, 4, 21, 50, 32, kv_heads=2, kv_layout="bhsd", lengths="kv", causal=True, dtype="float16"),
    Attention(2, 2, 7, 33, 16, dtype="float16", score_mod="oracles:halve_far_scores", causal=True),
    Attention(1, 2, 9, 4, 16, causal=True, causal_offset=-3, dtype="bfloat16"),
)

#: For wgmma and TMA, from 33 rows on: edges in every direction, fewer slices than stages, several tiles a block.
HOPPER_LINEARS = (
    Linear(70, 64, 64, dtype="bfloat16", bias=False),
    Linear(100, 200, 80, dtype="float16", activation="gelu_tanh", residual=True),
    Linear(300, 136, 130, dtype="bfloat16", activation="relu", out_dtype="float32"),
    Linear(200, 72, 48, dtype="float16", gated=True, activation="silu", residual=True),
    Linear(400, 328, 200, dtype="bfloat16"),
)

#: For wgmma and TMA, head_dim 64 and 128: every layout and variant, blocks at edges, queries that see no key.
HOPPER_ATTENTIONS = (
    Attention(1, 2, 70, 70, 64, dtype="bfloat16"),
    Attention(1, 1, 150, 182, 128, dtype="float16", layout="bhsd", causal=True, causal_offset=32),
    Attention(2, 2, 133, 133, 64, dtype="bfloat16", packed=True, causal=True, mask=True),
    Attention(1, 2, 130, 130, 128, kv_heads=1, dtype="float16", causal=True, window=50, alibi=True),
    Attention(2, 2, 40, 145, 64, dtype="bfloat16", layout="bhsd", softcap=3.0, bias_batch=2, bias_heads=1),
    Attention(2, 2, 35, 200, 64, kv_heads=1, dtype="float16", lengths="kv", causal=True),
    Attention(2, 1, 140, 140, 128, packed=True, dtype="bfloat16", lengths="qkv"),
    Attention(1, 1, 37, 133, 64, dtype="float16", score_mod="oracles:halve_far_scores", causal=True, scale=-0.2),
    Attention(1, 2, 40, 4, 64, causal=True, causal_offset=-3, dtype="bfloat16"),
    Attention(1, 4, 40, 180, 64, kv_heads=2, kv_layout="bhsd", lengths="kv", causal=True, dtype="bfloat16"),
)

#: Few rows of many in_features: what is split between blocks, in parts that are not equally long; every epilogue.
FEW_ROWS = (
    Linear(1, 1024, 40, dtype="bfloat16", bias=False),
    Linear(17, 648, 75, dtype="float16", activation="gelu", residual=True),
    Linear(5, 520, 64, dtype="bfloat16", gated=True, activation="silu", out_dtype="float32"),
    Linear(36, 512, 40, dtype="float16", activation="relu", seq=12),
)

#: Few queries over many keys: grouped heads, lengths of a cache with rows without keys, windows, biases, odd sizes.
DECODING = (
    Attention(2, 4, 1, 300, 64, kv_heads=2, lengths="kv", dtype="bfloat16"),
    Attention(3, 6, 3, 131, 32, kv_heads=2, layout="bhsd", lengths="kv", causal=True, alibi=True, window=70,
              dtype="float16"),
    Attention(1, 12, 4, 200, 48, kv_heads=1, causal=True, causal_offset=190, dtype="bfloat16"),
    Attention(2, 4, 1, 150, 64, kv_heads=2, kv_layout="bhsd", lengths="kv", causal=True, dtype="bfloat16"),
    Attention(2, 2, 1, 160, 32, mask=True, softcap=3.0, bias_batch=2, bias_heads=1, dtype="float16"),
)  # fmt: skip

TENSOR_CORES = (LINEARS, ATTENTIONS, HOPPER_LINEARS, HOPPER_ATTENTIONS, FEW_ROWS, DECODING)


def on_cuda() -> tuple[Workload, ...]:
    """Each of these; of operators with templates of their own, each again in every dtype tensor cores multiply."""
    found = dict.fromkeys(w for workloads in (*CORNERS.values(), *TENSOR_CORES) for w in workloads)
    own = {template.op for template in REGISTRY if template.kind == "cuda"}
    for workload in [w for w in found if w.op in own]:
        for dtype in ("bfloat16", "float16"):
            with contextlib.suppress(TypeError, WorkloadError):  # has no dtype, or not this one
                found.setdefault(workload.replace(dtype=dtype))
    return tuple(found)
