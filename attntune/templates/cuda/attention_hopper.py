"""Attention forward on Hopper's tensor cores: online softmax by wgmma over blocks that TMA brings into shared memory.

    blockIdx.y    sequences and heads
    blockIdx.x    blocks of 64 queries a consumer, under a causal mask the last first
    warpgroup 0   one thread of it, the producer: the queries, then blocks of ``key_block`` keys and of as many values
                  into the next of ``stages`` stages each, as soon as all consumers have released it
    the others    ``consumers`` warpgroups with 64 queries each: scores from shared memory; maxima, weights and sums in
                  registers, where weights are what the second product wants as its left operand; values are read as
                  they lie, rows of K

``persistent``: a block an SM, which stays for every so many-th block of queries; copies for the next pass behind the
results of the last. Under a causal mask those of all heads that see most keys come first, otherwise blocks of a head
come together. ``tma_store``: results not by each thread but through the shared memory of the block's queries, whole
rows at a time. ``producer_registers``: what the producer keeps (``setmaxnreg``); consumers have the rest.

``overlap``: the scores of a block are computed before the values of the block before are summed, so that its softmax
runs meanwhile. ``pingpong``: two consumers take turns at issuing products: one's run during the other's softmax.
Masks, biases, ALiBi, caps, windows, lengths and ``score_mod`` are those of the template for sm_80, whose registers hold
the same; where there is none of them the scale is multiplied into the exponential's argument.

Source: Shah et al., "FlashAttention-3" (2024).

Ladder, what each step is for; none has run on a GPU:
    1  TMA, wgmma, one consumer      copies take no registers and no instructions; keys are read by all queries at once
    2  producer, setmaxnreg          copies run ahead; consumers have 240 registers for scores, weights and sums
    3  two and three consumers       keys and values cross to shared memory once for 128 or 192 queries
    4  overlap                       exponentials behind the second product of the same warpgroup
    5  pingpong                      and behind the products of the other one
    6  persistent grid               the first copies of a block of queries behind the end of the one before
    7  results by TMA                whole rows a request, none past the last query
Open: queries of grouped heads in one block; split keys; a queue of blocks of queries instead of turns.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attntune.ops.attention import Attention
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cuda import hopper
from attntune.templates.cuda.attention_hopper_kernel import AttentionHopperKernel
from attntune.templates.template import ScheduleTemplate

_HEAD_DIMS = (64, 128)
#: Fewest queries: half of the least block is padding.
_MIN_QUERIES = 33
#: Registers of a thread beside scores, weights and sums, and those of scores that are more than scaled products.
_OTHER_REGISTERS = 40
_GENERAL_REGISTERS = 32


class AttentionHopper(ScheduleTemplate):
    """float16 and bfloat16, head_dim 64 or 128, from 33 queries on; all variants but ragged batches and weights."""

    op: ClassVar[str] = "attention"
    kind: ClassVar[str] = "cuda"

    def supports(self, workload: Workload, target: Target) -> bool:
        """Whether the target has wgmma and TMA, and the variant is one of the kernel's."""
        w = _attention(workload)
        shape = w.head_dim in _HEAD_DIMS and w.q_len >= _MIN_QUERIES
        variant = w.dtype in ("float16", "bfloat16") and not w.ragged and not w.weights
        return shape and variant and hopper.available(target)

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Consumers and their queries, keys of a block, blocks in flight, and what runs behind what."""
        w = _attention(workload)
        knobs = [
            Knob("consumers", tuple(n for n in (1, 2, 3) if n == 1 or 64 * n < w.q_len + 64)),
            Knob("key_block", tuple(n for n in (32, 64, 96, 128, 160, 176) if n == 32 or n < 2 * w.kv_len)),
            Knob("stages", (2, 3, 4)),
            Knob("overlap", (False, True)),
            Knob("pingpong", (False, True)),
            Knob("producer_registers", hopper.PRODUCER_REGISTERS),
            Knob("persistent", (False, True)),
            Knob("tma_store", (False, True)),
        ]

        def fits(config: Config) -> bool:
            consumers = config.integer("consumers")
            if config["pingpong"] and not (config["overlap"] and consumers == 2):
                return False
            producer = config.integer("producer_registers")
            if not hopper.split_is_legal(consumers, producer):
                return False
            held = hopper.consumer_registers(consumers, producer)
            return registers(w, config) <= held and shared_bytes(w, config) <= target.shared_memory_bytes

        return ConfigSpace(knobs, [fits])

    def default(self, workload: Workload, target: Target) -> Config:
        """128 queries and 128 keys, overlapped and in turns, with SMs that have equally many blocks."""
        w = _attention(workload)

        def cost(config: Config) -> tuple[float, str]:
            consumers, keys = config.integer("consumers"), config.integer("key_block")
            queries = 64 * consumers
            blocks = w.batch * w.heads * math.ceil(w.q_len / queries)
            most = math.ceil(blocks / target.sm_count)
            reads = 1.0 + 32.0 / queries + 16.0 / keys
            padding = math.ceil(w.kv_len / keys) * keys / w.kv_len
            behind = 1.0 + 0.2 * (not config["overlap"]) + 0.1 * (not config["pingpong"])
            shape = 1.0 + 0.02 * abs(math.log2(keys / 128)) + 0.02 * (config.integer("stages") - 2)
            shape += 0.001 * (config.integer("producer_registers") != (24 if consumers > 1 else 0))
            shape += 0.001 * bool(config["persistent"]) + 0.0005 * bool(config["tma_store"])
            return most * queries * reads * padding * behind * shape, config.key()

        return min(self.space(workload, target), key=cost)

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm

        return tvm.IRModule({"main": AttentionHopperKernel(_attention(workload), config, target.sm_count).function()})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, registers, shared memory, waves, padding and sizes."""
        w = _attention(workload)
        queries, keys = 64 * config.integer("consumers"), config.integer("key_block")
        blocks = w.batch * w.heads * math.ceil(w.q_len / queries)
        return {
            **super().features(workload, target, config),
            "queries": float(queries),
            "registers": registers(w, config) / target.registers_per_thread,
            "shared": shared_bytes(w, config) / target.shared_memory_bytes,
            "waves": blocks / target.sm_count,
            "query_padding": math.ceil(w.q_len / queries) * queries / w.q_len,
            "key_blocks": float(math.ceil(w.kv_len / keys)),
            "intensity": queries * keys / (queries + keys),
            "log_q": math.log2(w.q_len),
            "log_kv": math.log2(w.kv_len),
            "head_dim": float(w.head_dim),
        }


def shared_bytes(w: Attention, config: Config) -> int:
    """Shared memory of a block: queries (and results), stages, mbarriers, and what aligning the first may take."""
    stages = config.integer("stages")
    rows = 64 * config.integer("consumers") + 2 * stages * config.integer("key_block")
    return 2 * w.head_dim * rows + 8 * (2 + 4 * stages) + hopper.PATTERN_BYTES


def registers(w: Attention, config: Config) -> int:
    """Registers of a consumer's thread, estimated: scores, weights where both are live, sums, and others."""
    keys = config.integer("key_block")
    weights = keys // 4 if config["overlap"] else 0
    others = _OTHER_REGISTERS + _GENERAL_REGISTERS * bool(w.softcap or w.bias_heads or w.alibi or w.score_mod)
    return keys // 2 + weights + w.head_dim // 2 + others


def _attention(workload: Workload) -> Attention:
    assert isinstance(workload, Attention), f"expected an Attention workload, got {workload}"
    return workload
