"""Attention forward on tensor cores of sm_80 and later: online softmax over blocks of keys, by mma.sync.

    blockIdx.y    sequences and heads
    blockIdx.x    blocks of queries, under a causal mask the last first
    serial        blocks of ``key_block`` keys that a query of the block may see; while one is computed with,
                  ``stages - 1`` blocks of keys and values are on their way by cp.async
    warps         ``warp_tiles`` tiles of 16 queries each: scores, maxima, weights and sums all in registers
    unrolled      16 × 16 fragments by ldmatrix, m16n8k16 products with float32 sums

A score's register is where the second product wants the weight, so weights never leave registers. Only blocks at the
diagonal, at a window's edge and at the end are masked, except where a mask or lengths are operands. Masks, biases,
ALiBi, caps and ``score_mod`` are the definition's own expressions, on registers. Grouped heads share keys by index.

Source: Dao, "FlashAttention-2" (2023).

Ladder: none yet, for this kernel never ran on a GPU. Open: split keys for few queries (decoding); ragged batches.
On sm_90a ``attention_hopper.py`` comes first.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attntune.ops.attention import Attention
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cuda.attention_kernel import AttentionKernel, padded_dim
from attntune.templates.template import ScheduleTemplate

#: Registers of a thread beside fragments: addresses, maxima, totals …
_OTHER_REGISTERS = 56
#: … and temporaries of scores that are more than scaled products.
_GENERAL_REGISTERS = 32


class AttentionCUDA(ScheduleTemplate):
    """float16 and bfloat16, head_dim a multiple of 16 up to 256; all variants but ragged batches and weights."""

    op: ClassVar[str] = "attention"
    kind: ClassVar[str] = "cuda"

    def supports(self, workload: Workload, target: Target) -> bool:
        """Whether the target has the instructions, and the variant is one of the kernel's."""
        w = _attention(workload)
        shape = w.head_dim % 16 == 0 and w.head_dim <= 256
        variant = w.dtype in ("float16", "bfloat16") and not w.ragged and not w.weights
        return shape and variant and target.has("mma.sync", "ldmatrix", "cp.async")

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Warps and their queries, keys of a block, blocks in flight, and whether queries stay in registers."""
        w = _attention(workload)
        knobs = [
            Knob("warps", tuple(n for n in (1, 2, 4, 8) if n == 1 or 16 * n < 2 * w.q_len)),
            Knob("warp_tiles", (1, 2)),
            Knob("key_block", tuple(n for n in (16, 32, 64, 128) if n == 16 or n < 2 * w.kv_len)),
            Knob("stages", (2, 3)),
            Knob("hold_query", (False, True)),
        ]

        return ConfigSpace(knobs, [lambda config: fits(w, target, config)])

    def default(self, workload: Workload, target: Target) -> Config:
        """Blocks of about 64 queries of four warps and 64 keys, with SMs that have equally many."""
        w = _attention(workload)

        def cost(config: Config) -> tuple[float, str]:
            warps, tiles, keys = (config.integer(name) for name in ("warps", "warp_tiles", "key_block"))
            queries = 16 * warps * tiles
            blocks = w.batch * w.heads * math.ceil(w.q_len / queries)
            held = target.shared_memory_per_sm_bytes // (shared_bytes(w, config) + 1024)
            in_registers = target.registers_per_sm // (registers(w, config) * warps * 32)
            resident = max(1, min(held, in_registers, target.blocks_per_sm))
            most = math.ceil(blocks / target.sm_count)
            # Keys and values cross to shared memory once a block of queries, and to registers once a warp.
            reads = 1.0 + 32.0 / queries + 16.0 / (16 * tiles) + (0.0 if config["hold_query"] else 8.0 / keys)
            padding = math.ceil(w.kv_len / keys) * keys / w.kv_len
            shape = 1.0 + 0.02 * abs(math.log2(keys / 64)) + 0.1 * (min(resident, most) * warps < 8)
            shape += 0.05 * (config["stages"] == 3)
            return most * queries * reads * padding * shape, config.key()

        return min(self.space(workload, target), key=cost)

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm

        return tvm.IRModule({"main": AttentionKernel(_attention(workload), config).function()})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, registers, shared memory, waves, padding and sizes."""
        w = _attention(workload)
        queries = 16 * config.integer("warps") * config.integer("warp_tiles")
        keys = config.integer("key_block")
        blocks = w.batch * w.heads * math.ceil(w.q_len / queries)
        shared = shared_bytes(w, config)
        return {
            **super().features(workload, target, config),
            "queries": float(queries),
            "registers": registers(w, config) / target.registers_per_thread,
            "shared": shared / target.shared_memory_bytes,
            "blocks_per_sm": float(target.shared_memory_per_sm_bytes // (shared + 1024)),
            "waves": blocks / target.sm_count,
            "query_padding": math.ceil(w.q_len / queries) * queries / w.q_len,
            "key_blocks": math.ceil(w.kv_len / keys),
            "intensity": queries * keys / (queries + keys),
            "log_q": math.log2(w.q_len),
            "log_kv": math.log2(w.kv_len),
            "head_dim": float(w.head_dim),
        }


def shared_bytes(w: Attention, config: Config) -> int:
    """Bytes of a block's queries and its stages of keys and values."""
    queries = 16 * config.integer("warps") * config.integer("warp_tiles")
    return 2 * padded_dim(w.head_dim) * (queries + 2 * config.integer("stages") * config.integer("key_block"))


def fits(w: Attention, target: Target, config: Config) -> bool:
    """Whether a block has the shared memory and a thread the registers."""
    in_shared = shared_bytes(w, config) <= target.shared_memory_bytes
    return in_shared and registers(w, config) <= target.registers_per_thread


def registers(w: Attention, config: Config) -> int:
    """Registers of a thread, estimated: scores, sums, the queries held, and others."""
    tiles = config.integer("warp_tiles")
    held = w.head_dim // 4 if config["hold_query"] else 4
    others = _OTHER_REGISTERS + _GENERAL_REGISTERS * bool(w.softcap or w.bias_heads or w.alibi or w.score_mod)
    return tiles * (config.integer("key_block") // 2 + w.head_dim // 2 + held) + others


def _attention(workload: Workload) -> Attention:
    assert isinstance(workload, Attention), f"expected an Attention workload, got {workload}"
    return workload
