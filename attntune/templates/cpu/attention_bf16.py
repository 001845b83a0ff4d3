"""bfloat16 attention on CPUs with AVX512-BF16: the float32 template's blocks, with products of pairs (``vdpbf16ps``).

    scoresᵀ[j, i] = Σ over pairs of d: key pair, read as it lies and broadcast, × query pairs, transposed once a block
    weights       = exp2 to 1e-4 by a cubic, rounded, two keys to an int32; their sum is of the rounded weights
    out[i, :]    += weight pair, broadcast, × value pairs, two rows interleaved once for each block of keys

Scores, softmax and both sums are float32; the scale is applied to the scores in the exponential's multiply-add.

Error, against float64 on the same bfloat16 operands: each weight is off by a relative d, |d| <= 2^-9 + 1e-4; as they
are divided by their own sum, the result is off by at most 1.1 · 2^-8 · Σ_j w_j |v_j - out| before its own rounding
(2^-9, relative). Measured over all variants: at most 8e-3 on normal operands.

Ladder (GFLOP/s without the softmax; 12 heads × 64, batch 1, 2 cores of Zen 4, peak 468 as twice the 234 of one core):
the best config tried at each length, beside PyTorch's bfloat16 SDPA in a process of its own, not interleaved.

    seq              64   128   197   256   512   777  2048
    PyTorch          83   110   118   139   143   142   155
    this, best      346   379   347   397   384   361   391
    causal, PyTorch  41    54    59    69    70    95   127
    causal, best    191   300   302   323   367   361   362

On Emerald Rapids, whose multiply-adds are four times as fast as its products of pairs, the float32 kernel on widened
operands takes 1.23 to 1.38 times less (``widen``; 128 to 2048 keys, heads of 32 and 64).

In tiles of AMX (``amx``), on Emerald Rapids, 12 heads of 64, batch 1, untuned, medians (GFLOP/s without the softmax;
the host lets tiles run at 1,100 on both cores together most of the time, at 4,500 in bursts):

    seq                                                     512   2048   512 causal   2048 causal
    scores copied, weights transposed, kept for a block     526    502          571           597
    + scores stored in place, results of a group at once,
      weights added up by a tile of ones, values transposed
      instead of weights                                    750    710          772           645
    + blocks of 256 queries and 512 keys instead of 128     773    743          827           671
    causal, up to 128 queries: tiles of 2 vectors instead of 4, 1.06 to 1.12 times as fast

Without its softmax a kernel at 512 is 10 % faster, without the exponential 5 %, without pairing values 5 %.
"""

from __future__ import annotations

import math
from typing import Any

from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cpu import attention_amx_kernel, bf16
from attntune.templates.cpu.attention import AttentionCPU, _attention
from attntune.templates.cpu.attention_amx_kernel import TurnedValuesKernel, TurnedWeightsKernel
from attntune.templates.cpu.attention_bf16_kernel import AttentionBf16Kernel, AttentionWidenedKernel
from attntune.templates.cpu.attention_kernel import AttentionKernel

#: From so many keys and vectors of queries on, transposing values takes less time than transposing weights.
_TURNED_KEYS, _TURNED_VECTORS = 256, 8


class AttentionBf16CPU(AttentionCPU):
    """Fused attention with both products on pairs of bfloat16, softmax and sums in float32."""

    def supports(self, workload: Workload, target: Target) -> bool:
        """Every variant in bfloat16 with an even head."""
        w = _attention(workload)
        return w.dtype == "bfloat16" and w.head_dim % 2 == 0 and bf16.available(target)

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """The float32 template's, and whether operands are made float32 rather than multiplied as pairs."""
        space = super().space(workload, target)
        knobs = [*(knob for knob in space.knobs if knob.name != "copy_values"), Knob("widen", (False, True))]
        if attention_amx_kernel.supports(_attention(workload), target):
            knobs += [Knob("amx", (False, True)), Knob("turn_values", (False, True))]
        return ConfigSpace(knobs, [*space.constraints, _fits_tiles])

    def default(self, workload: Workload, target: Target) -> Config:
        """A score tile of two query vectors by eight keys; wide blocks of queries, which share the paired values.

        Where float32 is multiplied faster than pairs, as the float32 template would have it.
        """
        w = _attention(workload)
        tiled = attention_amx_kernel.supports(w, target)
        if not tiled and bf16.slower_than_float32(target):
            return super().default(workload, target).replace(widen=True)
        query_vectors = math.ceil(w.q_len / target.lanes("float32"))
        keys = w.kv_len if w.kv_len <= 512 else 128 if w.kv_len % 128 else 512
        wanted = {
            "query_vectors": 2, "key_tile": 8, "query_tiles": min(4, max(1, query_vectors // 2)), "key_block": keys,
            "out_rows": 4, "heads_inner": 0, "widen": 0,
        }  # fmt: skip
        if tiled:
            turned = w.kv_len >= _TURNED_KEYS and query_vectors >= _TURNED_VECTORS
            # Turned values are shared by all queries of a block; every core has some blocks.
            most = 4 if turned else 2
            while most > 1 and w.batch * w.heads * math.ceil(query_vectors / (4 * most)) < 2 * target.cores:
                most //= 2
            # Of few queries, narrow tiles leave more to skip beyond the diagonal.
            vectors = 2 if w.causal and query_vectors <= _TURNED_VECTORS and not turned else 4
            tiles = min(most * 4 // vectors, max(1, query_vectors // vectors))
            wanted |= {"query_vectors": vectors, "query_tiles": tiles, "amx": 1}
            wanted |= {"key_block": min(w.kv_len, 512), "turn_values": turned}

        def distance(config: Config) -> tuple[float, str]:
            apart = (abs(math.log2((int(config[name]) + 1) / (value + 1))) for name, value in wanted.items())
            # Not a matter of degree.
            return sum(apart) + 100.0 * (config.get("amx", False) != tiled), config.key()

        return min(self.space(workload, target), key=distance)

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm

        kernel: type[AttentionKernel] = AttentionWidenedKernel if config.get("widen", False) else AttentionBf16Kernel
        if config.get("amx", False):
            kernel = TurnedValuesKernel if config["turn_values"] else TurnedWeightsKernel
        return tvm.IRModule({"main": kernel(_attention(workload), target, config).function()})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """The float32 template's, and how operands are multiplied."""
        how = {name: float(config.get(name, False)) for name in ("widen", "amx", "turn_values")}
        return {**super().features(workload, target, config), **how}


def _fits_tiles(config: Config) -> bool:
    """AMX's tiles have the size they have: knobs that say otherwise keep one value each."""
    if not config.get("amx", False):
        return not config.get("turn_values", False)
    return not config["widen"] and config["key_tile"] == 2 and config["out_rows"] == 1
