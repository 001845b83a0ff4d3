"""Attention on CPUs: online softmax over blocks of keys, with the scores kept transposed.

A block of queries is transposed once, so that vector lanes run over queries. Scores are then held key by key:

    scoresᵀ[j, i] = Σ_d key[j, d] · queryᵀ[d, i]     key read as it lies, one scalar broadcast a multiply-add
    softmax over j                                    lane-wise: no horizontal reductions, causal masks per lane
    out[i, :] += scoresᵀ[j, i] · value[j, :]          value read as it lies, one scalar broadcast a multiply-add

so neither keys nor values need packing, whatever their strides, and grouped heads cost nothing. Scores are scaled by
log2 e with the query, and the exponential is exp2. Masks, ALiBi and biases are what a score's sum starts from; only
tiles on the diagonal or at the window's edge are masked, and tiles that no query of theirs sees are skipped, in both
products. Scores that are not such sums (softcap, ``score_mod``) take one more pass.

Scheduling primitives cannot derive the running maximum, so this template is written in TIR and checked against the
same reference as every other. Queries round up to one vector, keys not at all.

Ladder (GFLOP/s without the softmax; 12 heads, float32, 2 cores of Zen 4, measured peak 226 to 231):

    seq 512 × 64, first guess of a default                        148
    + full register tiles, score blocks in the first-level cache  195
    + maxima taken in the score tile, 12 accumulators, 96 queries 204
    seq 128 × 32, packed qkv, padding mask                        150-160
    + queries transposed by shuffles, the mask as initial sum     189
    values copied to a contiguous block first: 5 % slower, left out
    4 vectors × 4 keys, 2 × 8, 1 × 12 with query_tiles 2: 25 % slower where the second product's sums are spilled
    odd strides between query vectors: no difference beyond noise, kept

The same on 2 cores of Zen 3 (AVX2, measured peak 189), 12 heads of 64, softmax included:

    seq 512, 2 vectors of the head × 4 queries in registers       102
    + 3 × 4                                                       107
    + values of a pass copied side by side                        112  (PyTorch's layout: 130 either way)

and in quieter moments there (peak 197 to 205), the quickest of hundreds of runs, PyTorch's layout / side by side:

    seq 512, as above                                             162 / 150
    + sums of scores begin with a product, terms come last        162 / 157
    + 4 components a pass, softmax of one vector after another    163 / 160
    + blocks of 64 keys, or 96 queries and 128 keys if copied     168 / 165
    seq 1024, all of that, 96 queries and 64 keys                 172 (160 before)
    keys copied side by side, too: 2 to 3 % slower, but for a stride of a power of two (2 % faster)
    2 vectors of the head × 6 queries: 0 to 3 % slower than 3 × 4

Sums of 64 products, 12 in registers, take 384 cycles there, 408 if they begin with zero and are stored, and 389 if they
begin with a product: a store takes a cycle from multiply-adds, which read three operands, and none from products. An
exponential takes 5.6 cycles a vector whatever its polynomial's form; on 64 components that is 8 % of the time. Linear
layers, whose sums are of 384 products and more, gain nothing: in such moments they are at 98 % of the peak.

On 2 cores of Emerald Rapids Zen 4's default (3 vectors × 4 keys, blocks of 96 queries and 256 keys) takes 0.99 to 1.11
times as long as 4 × 4 and 64 × 64, or 3 × 4 and 48 × 64 where causal, in the mean of 20 shapes 1.035; 4 × 6 is as fast.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attntune.ops.attention import Attention
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cpu.attention_blocks import held_dims
from attntune.templates.cpu.attention_kernel import AttentionKernel
from attntune.templates.template import ScheduleTemplate

#: Queries in a block from which on copied values are read often enough to pay for the copy.
_COPY_QUERIES = 32


class AttentionCPU(ScheduleTemplate):
    """Fused attention: memory linear in sequence length, causal blocks skipped."""

    op: ClassVar[str] = "attention"
    kind: ClassVar[str] = "cpu"

    def supports(self, workload: Workload, target: Target) -> bool:
        """Float32 operands; every variant."""
        return _attention(workload).dtype == "float32"

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Queries and keys per block, and the register tiles of both products."""
        w = _attention(workload)
        lanes, registers = target.lanes("float32"), target.vector_registers
        dims = held_dims(w.head_dim, target)
        query_vectors = math.ceil(w.q_len / lanes)
        knobs = [
            Knob("query_vectors", tuple(v for v in (1, 2, 3, 4) if v <= query_vectors)),
            Knob("query_tiles", tuple(t for t in (1, 2, 4) if t == 1 or t <= query_vectors)),
            Knob("key_block", (*tuple(b for b in (64, 128, 256, 512) if b < w.kv_len), w.kv_len)),
            Knob("key_tile", tuple(t for t in (2, 4, 6, 8, 12) if t == 2 or t <= w.kv_len)),
            Knob("out_rows", tuple(r for r in (1, 2, 4, 8) if lanes % r == 0)),
            # Whether a core takes all heads of some queries, rather than all queries of some heads.
            Knob("heads_inner", (False, True) if query_vectors > 1 and w.heads > 1 else (False,)),
        ]

        if dims < math.ceil(w.head_dim / lanes):
            # Several passes over the values: whether each first copies its columns of them side by side.
            knobs.append(Knob("copy_values", (False, True)))

        def fits(config: Config) -> bool:
            vectors, tile = config.integer("query_vectors"), config.integer("key_tile")
            block_vectors = vectors * config.integer("query_tiles")
            scores_fit = vectors * tile + vectors < registers and vectors * tile >= min(8, 2 * vectors)
            out_fit = config.integer("out_rows") * dims + dims < registers
            blocks_needed = config.integer("query_tiles") == 1 or block_vectors < query_vectors + vectors
            working_set = 4 * block_vectors * lanes * (config.integer("key_block") + 2 * w.head_dim)
            return scores_fit and out_fit and blocks_needed and working_set <= max(target.l2_bytes, 64 * 1024)

        return ConfigSpace(knobs, [fits])

    def default(self, workload: Workload, target: Target) -> Config:
        """Register tiles of a dozen accumulators, blocks of about 96 queries and 256 keys, balanced cores.

        Where two multiply-adds of 512 bits start in a cycle: blocks of 64 queries, or 48 where causal, and 64 keys.
        With 16 registers: 48 queries and 64 keys, or 96 and 128 where values are copied.
        """
        w = _attention(workload)
        lanes, registers = target.lanes("float32"), target.vector_registers
        dims = held_dims(w.head_dim, target)
        query_vectors = math.ceil(w.q_len / lanes)
        two = target.fmas_per_cycle >= 2 and target.vector_bits == 512
        sums, wide, height, length = 12, 3, 6, 256
        if two:
            # Narrow tiles leave more of them to skip beyond the diagonal.
            sums, wide, height = (12, 3, 3) if w.causal else (16, 4, 4)
            length = 64 if w.causal or w.kv_len > 128 else 128
        # Rows of a head that lie side by side fit the cache as they are; with 32 registers a copy was 5 % slower.
        copies = registers < 32 and not w.heads_apart("value")
        if registers < 32:
            # Scores and the values that they weight then stay in a first-level cache of 32 KiB.
            length = 128 if copies else 64
            height = 12 if copies or w.kv_len >= 1024 else 6

        def cost(config: Config) -> tuple[float, str]:
            vectors, tile, rows = (config.integer(n) for n in ("query_vectors", "key_tile", "out_rows"))
            block_vectors = vectors * config.integer("query_tiles")
            blocks = math.ceil(query_vectors / block_vectors)
            tasks = w.batch * w.heads * blocks
            imbalance = math.ceil(tasks / target.cores) * target.cores / tasks
            # More accumulators than these bring nothing, and the register allocator spills them.
            tiles = _fill_cost(vectors * tile, sums) * _fill_cost(rows * dims, 16)
            if registers < 32:
                # Scores are half the work, and broadcasting a key takes as long as two loads. (Zen 3, 16 queries of 9
                # heads on 3: 1×12 took 1.35 times as long as 2×6, though it shares out evenly and that does not.)
                tiles *= 0.5 + 0.5 * max(1.0, 0.85 * (2 * tile + vectors) / (vectors * tile))
            shape = 1.0 + 0.01 * abs(vectors - wide) + 0.01 * abs(min(block_vectors, query_vectors) - height)
            # A block's last vectors that fill no tile.
            shape += 0.02 * (math.ceil(query_vectors / blocks) % vectors > 0)
            keys = min(config.integer("key_block"), w.kv_len)
            blocked = 1.0 + 0.02 * abs(math.log2(keys / min(length, w.kv_len)))
            # Rows that the layers before and after compute on this core, unless keys and values then leave its cache.
            keys_and_values = 8 * w.kv_len * w.kv_heads * w.head_dim
            local = w.batch % target.cores != 0 and w.layout == "bshd" and keys_and_values <= target.l2_bytes // 2
            order = 1.0 if config["heads_inner"] == local else 1.01
            # Few queries have little use of a copy.
            copied = copies and min(block_vectors, query_vectors) * lanes >= _COPY_QUERIES
            if config.get("copy_values", copied) != copied:
                order *= 1.02
            return imbalance * tiles * shape * blocked * order, config.key()

        return min(self.space(workload, target), key=cost)

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm

        return tvm.IRModule({"main": AttentionKernel(_attention(workload), target, config).function()})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, registers, the score block against each cache, padding and balance."""
        w = _attention(workload)
        lanes = target.lanes("float32")
        vectors, tile, rows = (config.integer(n) for n in ("query_vectors", "key_tile", "out_rows"))
        dims = held_dims(w.head_dim, target)
        block_queries = vectors * lanes * config.integer("query_tiles")
        tasks = w.batch * w.heads * math.ceil(w.q_len / block_queries)
        block = 4.0 * block_queries * min(config.integer("key_block"), w.kv_len)
        return {
            **super().features(workload, target, config),
            "copy_values": float(config.get("copy_values", False)),
            "score_registers": (vectors * tile + vectors) / target.vector_registers,
            "out_registers": (rows * dims + dims) / target.vector_registers,
            "score_intensity": vectors * tile / (vectors + tile),
            "out_intensity": rows * dims / (rows + dims),
            "block_in_l1": block / target.l1d_bytes,
            "block_in_l2": block / target.l2_bytes,
            "query_padding": _ceil(w.q_len, lanes) / w.q_len,
            "imbalance": math.ceil(tasks / target.cores) * target.cores / tasks,
            "key_blocks": math.ceil(w.kv_len / config.integer("key_block")),
            "key_tail": (w.kv_len % tile) / tile,
            "last_vectors": float(math.ceil(w.q_len / lanes) % vectors),
            "log_q": math.log2(w.q_len),
            "log_kv": math.log2(w.kv_len),
            "head_dim": float(w.head_dim),
        }


def _fill_cost(accumulators: int, wanted: int) -> float:
    """Relative time of a register tile: too few leave the multiply-adds waiting for one another."""
    return math.sqrt(max(1.0, wanted / accumulators)) * (1.0 + 0.01 * max(0, accumulators - wanted))


def _ceil(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def _attention(workload: Workload) -> Attention:
    assert isinstance(workload, Attention), f"expected an Attention workload, got {workload}"
    return workload
