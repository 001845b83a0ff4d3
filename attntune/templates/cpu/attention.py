"""Attention on CPUs: online softmax over blocks of keys, with the scores kept transposed.

A block of queries is transposed once, so that vector lanes run over queries. Scores are then held key by key:

    scoresᵀ[j, i] = Σ_d key[j, d] · queryᵀ[d, i]     key read as it lies, one scalar broadcast a multiply-add
    softmax over j                                    lane-wise: no horizontal reductions, causal masks per lane
    out[i, :] += scoresᵀ[j, i] · value[j, :]          value read as it lies, one scalar broadcast a multiply-add

so neither keys nor values need packing, whatever their strides, and grouped heads cost nothing. Scores are scaled by
log2 e with the query, and the exponential is exp2.

Scheduling primitives cannot derive the running maximum, so this template is written in TIR and checked against the
same reference as every other. Bounds of the last block are computed, not padded: queries round up to ``query_vectors``
vectors, keys not at all.

Ladder (GFLOP/s without the softmax; 12 heads, float32, 2 cores of Zen 4, measured peak 215 to 230):

    seq 512 × 64, first guess of a default                        148
    + full register tiles, score blocks in the first-level cache  195
    seq 128 × 32, packed qkv, padding mask                        150-160
    values copied to a contiguous block first: 5 % slower, left out
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from attntune.ops.attention import FLOOR, MASKED, Attention
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.template import ScheduleTemplate


class AttentionCPU(ScheduleTemplate):
    """Fused attention: memory linear in sequence length, causal blocks skipped."""

    op: ClassVar[str] = "attention"
    kind: ClassVar[str] = "cpu"

    def supports(self, workload: Workload, target: Target) -> bool:
        """Float32; plain, causal, masked or biased, in the fused layout."""
        w = _attention(workload)
        plain = Attention(
            w.batch, w.heads, w.q_len, w.kv_len, w.head_dim, w.kv_heads, w.packed, w.causal, w.causal_offset, w.mask,
            w.bias_batch, w.bias_heads, w.scale,
        )  # fmt: skip
        return w == plain

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Queries and keys per block, and the register tiles of both products."""
        w = _attention(workload)
        lanes = target.lanes("float32")
        registers = target.vector_registers
        dims = math.ceil(w.head_dim / lanes)
        query_vectors = math.ceil(w.q_len / lanes)
        knobs = [
            Knob("query_vectors", tuple(v for v in (1, 2, 3, 4) if v <= query_vectors)),
            Knob("query_tiles", tuple(t for t in (1, 2, 3, 4) if t == 1 or t <= query_vectors)),
            Knob("key_block", (*tuple(b for b in (32, 64, 128, 256, 512) if b < w.kv_len), _ceil(w.kv_len, 4))),
            Knob("key_tile", tuple(t for t in (1, 2, 4, 6, 8, 12) if t <= max(1, w.kv_len))),
            Knob("out_rows", (1, 2, 3, 4, 6, 8, 12)),
            # Whether a core takes all heads of some queries, rather than all queries of some heads.
            Knob("heads_inner", (False, True) if query_vectors > 1 and w.heads > 1 else (False,)),
        ]

        def fits(config: Config) -> bool:
            vectors, tile = config.integer("query_vectors"), config.integer("key_tile")
            scores_fit = vectors * tile + vectors <= registers
            dims_held = min(dims, registers // 4)
            out_fit = config.integer("out_rows") * dims_held + dims_held <= registers
            block_queries = vectors * lanes * config.integer("query_tiles")
            blocks_needed = config.integer("query_tiles") == 1 or block_queries <= _ceil(w.q_len, lanes * vectors)
            working_set = 4 * block_queries * (config.integer("key_block") + 2 * w.head_dim)
            return scores_fit and out_fit and blocks_needed and working_set <= max(target.l2_bytes, 64 * 1024)

        return ConfigSpace(knobs, [fits])

    def default(self, workload: Workload, target: Target) -> Config:
        """Register tiles as full as they go, score blocks that stay in the first-level cache, balanced cores."""
        w = _attention(workload)
        lanes = target.lanes("float32")
        dims = min(math.ceil(w.head_dim / lanes), target.vector_registers // 4)

        def cost(config: Config) -> tuple[float, str]:
            vectors, tile, rows = (config.integer(n) for n in ("query_vectors", "key_tile", "out_rows"))
            block_queries = vectors * lanes * config.integer("query_tiles")
            blocks = math.ceil(w.kv_len / config.integer("key_block"))
            padded = _ceil(w.q_len, vectors * lanes) / w.q_len
            tasks = w.batch * w.heads * math.ceil(w.q_len / block_queries)
            imbalance = math.ceil(tasks / target.cores) * target.cores / tasks
            products = _step_cost(tile, vectors, target) + _step_cost(rows, dims, target)
            block_bytes = 4 * block_queries * min(config.integer("key_block"), w.kv_len)
            in_cache = (
                1.0 if block_bytes <= 0.6 * target.l1d_bytes else 1.03 if block_bytes <= target.l1d_bytes else 1.08
            )
            # Every block of keys rescales what is held of the result; every block of queries reads all keys again.
            rescale = 1.0 + (2.0 / config.integer("key_block") if blocks > 1 else 0.0)
            reread = 1.0 + 1.0 / block_queries
            # Rows that the layers before and after compute on this core, unless keys and values then leave its cache.
            keys_and_values = 8 * w.kv_len * w.kv_heads * w.head_dim
            local = w.batch % target.cores != 0 and keys_and_values <= target.l2_bytes // 2
            order = 1.0 if config["heads_inner"] == local else 1.01
            tails = 1.0 + 0.03 * bool(w.kv_len % tile) + 0.01 * bool(block_queries % rows)
            return padded * imbalance * products * in_cache * rescale * reread * order * tails, config.key()

        return min(self.space(workload, target), key=cost)

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm

        return tvm.IRModule({"main": _Kernel(_attention(workload), target, config).function()})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, registers, the score block against each cache, padding and balance."""
        w = _attention(workload)
        lanes = target.lanes("float32")
        vectors, tile, rows = (config.integer(n) for n in ("query_vectors", "key_tile", "out_rows"))
        dims = math.ceil(w.head_dim / lanes)
        block_queries = vectors * lanes * config.integer("query_tiles")
        tasks = w.batch * w.heads * math.ceil(w.q_len / block_queries)
        block = 4.0 * block_queries * min(config.integer("key_block"), w.kv_len)
        return {
            **super().features(workload, target, config),
            "score_registers": (vectors * tile + vectors) / target.vector_registers,
            "out_registers": (rows * dims + dims) / target.vector_registers,
            "score_intensity": vectors * tile / (vectors + tile),
            "out_intensity": rows * dims / (rows + dims),
            "block_in_l1": block / target.l1d_bytes,
            "block_in_l2": block / target.l2_bytes,
            "query_padding": _ceil(w.q_len, vectors * lanes) / w.q_len,
            "imbalance": math.ceil(tasks / target.cores) * target.cores / tasks,
            "key_blocks": math.ceil(w.kv_len / config.integer("key_block")),
            "key_tail": (w.kv_len % tile) / tile,
            "log_q": math.log2(w.q_len),
            "log_kv": math.log2(w.kv_len),
            "head_dim": float(w.head_dim),
        }


class _Kernel:
    """One attention kernel being written out, statement by statement."""

    def __init__(self, w: Attention, target: Target, config: Config) -> None:
        self.w = w
        self.lanes = target.lanes("float32")
        self.vectors = config.integer("query_vectors")
        self.block_queries = self.vectors * self.lanes * config.integer("query_tiles")
        self.key_block = min(config.integer("key_block"), _ceil(w.kv_len, 4))
        self.key_tile = config.integer("key_tile")
        self.out_rows = config.integer("out_rows")
        self.heads_inner = bool(config["heads_inner"])
        self.dim_vectors = math.ceil(w.head_dim / self.lanes)
        # Wide heads are covered by several passes over as many registers as leave room for rows.
        self.dims_held = min(self.dim_vectors, target.vector_registers // 4)
        self.padded_dim = self.dim_vectors * self.lanes
        self.vector = f"float32x{self.lanes}"

    def function(self) -> Any:
        from tvm.script.ir_builder import IRBuilder
        from tvm.tirx.script.builder import ir as T

        w = self.w
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"global_symbol": "main", "tirx.noalias": True})
            self.operand = {
                spec.name: T.arg(spec.name, T.buffer(spec.shape, spec.dtype)) for spec in (*w.inputs(), *w.outputs())
            }
            with T.sblock("root"):
                blocks = math.ceil(w.q_len / self.block_queries)
                with T.parallel(w.batch * w.heads * blocks) as task, T.sblock("block"):
                    if self.heads_inner:
                        head, block = task % w.heads, task // w.heads % blocks
                    else:
                        head, block = task // blocks % w.heads, task % blocks
                    self._block(task // (w.heads * blocks), head, block)
        return builder.get()

    # -- one block of queries ------------------------------------------------------------------------------------------

    def _block(self, b: Any, h: Any, block: Any) -> None:
        from tvm.tirx.script.builder import ir as T

        w, lanes = self.w, self.lanes
        T.reads()
        T.writes()
        self.b, self.h, self.first = b, h, block * self.block_queries
        group_width = w.heads // w.kv_heads
        q_width, kv_width = w.heads * w.head_dim, w.kv_heads * w.head_dim
        kv_column = h // group_width * w.head_dim
        names = ("qkv",) * 3 if w.packed else ("query", "key", "value")
        self.query, self.key, self.value = (self.operand[name] for name in names)
        self.q_at = h * w.head_dim
        self.k_at = kv_column + (q_width if w.packed else 0)
        self.v_at = kv_column + (q_width + kv_width if w.packed else 0)

        self.qt = T.sblock_alloc_buffer((w.head_dim, self.block_queries), "float32")
        self.p = T.sblock_alloc_buffer((_ceil(self.key_block, self.key_tile), self.block_queries), "float32")
        self.out = T.sblock_alloc_buffer((self.block_queries, self.padded_dim), "float32")
        self.top = T.sblock_alloc_buffer((self.block_queries,), "float32")
        self.total = T.sblock_alloc_buffer((self.block_queries,), "float32")
        self.alpha = T.sblock_alloc_buffer((self.block_queries,), "float32")
        # Queries of this block, and how many groups of query vectors they fill.
        queries = (
            T.min(self.block_queries, w.q_len - self.first) if w.q_len % self.block_queries else self.block_queries
        )
        group = self.vectors * lanes
        groups = (queries + (group - 1)) // group if w.q_len % self.block_queries else self.block_queries // group
        self._transpose_queries(groups)

        with T.serial(groups * self.vectors) as v:
            self._store(self.top, [v * lanes], self._splat(FLOOR))
            self._store(self.total, [v * lanes], self._splat(0.0))
        one_pass = self.key_block >= w.kv_len
        row_tiles = self._row_tiles(queries)
        if w.causal:
            # Keys past the last query of the block are never touched.
            reach = T.max(T.min(self.first + queries + w.causal_offset, w.kv_len), 1 if one_pass else 0)
        else:
            reach = w.kv_len
        if one_pass:
            self._key_block(0, reach, groups, row_tiles, first=True)
        else:
            with T.serial(self.block_queries) as i:
                for e in range(self.dim_vectors):
                    self._store(self.out, [i, e * lanes], self._splat(0.0))
            with T.serial((reach + (self.key_block - 1)) // self.key_block) as kb:
                start = kb * self.key_block
                exact = not w.causal and w.kv_len % self.key_block == 0
                keys = self.key_block if exact else T.min(self.key_block, reach - start)
                self._key_block(start, keys, groups, row_tiles, first=False)
        self._finish(queries)

    def _row_tiles(self, queries: Any) -> Any:
        rows = self.out_rows
        if isinstance(queries, int):
            return math.ceil(queries / rows)
        return (queries + (rows - 1)) // rows

    def _transpose_queries(self, groups: Any) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = self.w
        scale = tirx.const(w.scaling * math.log2(math.e), "float32")
        with T.serial(groups * self.vectors * self.lanes) as i:
            if w.q_len % (self.vectors * self.lanes):
                with T.If(self.first + i < w.q_len):
                    with T.Then(), T.serial(w.head_dim) as d:
                        T.buffer_store(self.qt, self.query[self.b, self.first + i, self.q_at + d] * scale, [d, i])
                    with T.Else(), T.serial(w.head_dim) as d:
                        T.buffer_store(self.qt, tirx.const(0.0, "float32"), [d, i])
            else:
                with T.serial(w.head_dim) as d:
                    T.buffer_store(self.qt, self.query[self.b, self.first + i, self.q_at + d] * scale, [d, i])

    # -- one block of keys ---------------------------------------------------------------------------------------------

    def _key_block(self, start: Any, keys: Any, groups: Any, row_tiles: Any, first: bool) -> None:
        from tvm.tirx.script.builder import ir as T

        tile = self.key_tile
        with T.serial(groups) as g:
            with T.serial(keys // tile) as t:
                self._score_tile(start, t * tile, tile, g)
            if self.w.causal:
                # The number of keys is not known here: the remainder goes one key at a time.
                if tile > 1:
                    with T.serial(keys % tile) as r:
                        self._score_tile(start, keys // tile * tile + r, 1, g)
            elif self.w.kv_len % tile or self.key_block % tile:
                for height in {self.w.kv_len % self.key_block % tile, self.key_block % tile} - {0}:
                    with T.If(keys % tile == height), T.Then():
                        self._score_tile(start, keys // tile * tile, height, g)
            self._softmax(keys, g, first)
        with T.serial(row_tiles) as t:
            for low in range(0, self.dim_vectors, self.dims_held):
                self._out_tile(start, keys, t, range(low, min(low + self.dims_held, self.dim_vectors)), first)

    def _score_tile(self, start: Any, at: Any, height: int, g: Any) -> None:
        """Scores of ``height`` keys from ``start + at`` for query group ``g``, masked, and their running maximum."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, lanes = self.w, self.lanes
        acc = T.sblock_alloc_buffer((height, self.vectors, lanes), "float32", scope="local")
        with T.unroll(height) as a, T.unroll(self.vectors) as v:
            self._store(acc, [a, v, 0], self._splat(0.0))
        with T.serial(w.head_dim) as d, T.unroll(height) as a, T.unroll(self.vectors) as v:
            key = self._broadcast(self.key[self.b, start + at + a, self.k_at + d])
            query = self._load(self.qt, [d, (g * self.vectors + v) * lanes])
            self._store(acc, [a, v, 0], self._load(acc, [a, v, 0]) + key * query)
        log2e = tirx.const(math.log2(math.e), "float32")
        masked = self._splat(MASKED)
        with T.unroll(height) as a, T.unroll(self.vectors) as v:
            j = start + at + a
            lane0 = (g * self.vectors + v) * lanes
            if w.bias_heads:
                bias = self.operand["bias"]
                batch = self.b if w.bias_batch > 1 else 0
                head = self.h if w.bias_heads > 1 else 0
                # Lanes run over queries, which are rows of the bias: a gather, written as a loop to be vectorised.
                with T.vectorized(lanes) as lane:
                    row = tirx.min(self.first + lane0 + lane, w.q_len - 1)
                    T.buffer_store(acc, acc[a, v, lane] + bias[batch, head, row, j] * log2e, [a, v, lane])
            score = self._load(acc, [a, v, 0])
            if w.mask:
                allowed = self.operand["mask"][self.b, j] != tirx.const(0, "int64")
                score = score + self._broadcast(
                    tirx.Select(allowed, tirx.const(0.0, "float32"), tirx.const(MASKED, "float32"))
                )
            if w.causal:
                reach = self._broadcast(self.first + lane0 + w.causal_offset) + self._lane_index()
                score = tirx.Select(self._broadcast(j) <= reach, score, masked)
            self._store(self.p, [at + a, lane0], score)

    def _softmax(self, keys: Any, g: Any, first: bool) -> None:
        """Exponentials of the block, the new maximum and sum, and ``alpha``, what earlier sums shrink by."""
        from tvm.tirx.script.builder import ir as T

        from attntune.ops import math as tmath

        lanes = self.lanes
        best = T.sblock_alloc_buffer((self.vectors, lanes), "float32", scope="local")
        added = T.sblock_alloc_buffer((self.vectors, lanes), "float32", scope="local")
        with T.unroll(self.vectors) as v:
            self._store(best, [v, 0], self._load(self.top, [(g * self.vectors + v) * lanes]))
        with T.serial(keys) as j, T.unroll(self.vectors) as v:
            score = self._load(self.p, [j, (g * self.vectors + v) * lanes])
            self._store(best, [v, 0], T.max(self._load(best, [v, 0]), score))
        with T.unroll(self.vectors) as v:
            at = (g * self.vectors + v) * lanes
            if not first:
                with T.vectorized(lanes) as lane:
                    shrink = tmath.exp2_nonpositive(self.top[at + lane] - best[v, lane])
                    T.buffer_store(self.alpha, shrink, [at + lane])
            self._store(self.top, [at], self._load(best, [v, 0]))
            self._store(added, [v, 0], self._splat(0.0))
        with T.serial(keys) as j, T.unroll(self.vectors) as v:
            at = (g * self.vectors + v) * lanes
            with T.vectorized(lanes) as lane:
                T.buffer_store(self.p, tmath.exp2_nonpositive(self.p[j, at + lane] - best[v, lane]), [j, at + lane])
            self._store(added, [v, 0], self._load(added, [v, 0]) + self._load(self.p, [j, at]))
        with T.unroll(self.vectors) as v:
            at = (g * self.vectors + v) * lanes
            total = self._load(added, [v, 0])
            if not first:
                total = total + self._load(self.total, [at]) * self._load(self.alpha, [at])
            self._store(self.total, [at], total)

    def _out_tile(self, start: Any, keys: Any, t: Any, dims: range, first: bool) -> None:
        """``out_rows`` rows of the result over ``dims`` vectors of the head."""
        from tvm.tirx.script.builder import ir as T

        _w, lanes, rows = self.w, self.lanes, self.out_rows
        acc = T.sblock_alloc_buffer((rows, len(dims), lanes), "float32", scope="local")
        # Rows past the block's last query lie inside the buffers and are never written to the result.
        row = [T.min(t * rows + a, self.block_queries - 1) if self.block_queries % rows else t * rows + a
               for a in range(rows)]  # fmt: skip
        for a in range(rows):
            for e, dim in enumerate(dims):
                if first:
                    self._store(acc, [a, e, 0], self._splat(0.0))
                else:
                    shrink = self._broadcast(self.alpha[row[a]])
                    self._store(acc, [a, e, 0], self._load(self.out, [row[a], dim * lanes]) * shrink)
        with T.serial(keys) as j:
            for a in range(rows):
                for e, dim in enumerate(dims):
                    weight = self._broadcast(self.p[j, row[a]])
                    value = self._value(start + j, dim)
                    self._store(acc, [a, e, 0], self._load(acc, [a, e, 0]) + weight * value)
        for a in range(rows):
            for e, dim in enumerate(dims):
                self._store(self.out, [row[a], dim * lanes], self._load(acc, [a, e, 0]))

    def _value(self, j: Any, dim: int) -> Any:
        """One vector of value row ``j``; the head's last vector may be partial."""
        from tvm import tirx

        w, lanes = self.w, self.lanes
        whole = (dim + 1) * lanes <= w.head_dim
        if whole:
            return self.value.vload([self.b, j, self.v_at + dim * lanes], dtype=self.vector)
        parts = [
            self.value[self.b, j, self.v_at + min(dim * lanes + lane, w.head_dim - 1)] for lane in range(lanes)
        ]  # fmt: skip
        return tirx.Shuffle(parts, list(range(lanes)))

    def _finish(self, queries: Any) -> None:
        """Divide by the sums and write the rows that exist."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, lanes = self.w, self.lanes
        target = self.operand["out"]
        with T.serial(queries) as i:
            inverse = T.sblock_alloc_buffer((1,), "float32", scope="local")
            tiny = tirx.const(1e-30, "float32")
            T.buffer_store(inverse, tirx.const(1.0, "float32") / T.max(self.total[i], tiny), [0])
            for dim in range(self.dim_vectors):
                whole = (dim + 1) * lanes <= w.head_dim
                if whole:
                    scaled = self._load(self.out, [i, dim * lanes]) * self._broadcast(inverse[0])
                    self._store(target, [self.b, self.first + i, self.h * w.head_dim + dim * lanes], scaled)
                else:
                    with T.serial(w.head_dim - dim * lanes) as e:
                        T.buffer_store(
                            target, self.out[i, dim * lanes + e] * inverse[0],
                            [self.b, self.first + i, self.h * w.head_dim + dim * lanes + e],
                        )  # fmt: skip

    # -- vectors -------------------------------------------------------------------------------------------------------

    def _load(self, buffer: Any, at: list[Any]) -> Any:
        return buffer.vload(at, dtype=self.vector)

    def _store(self, buffer: Any, at: list[Any], value: Any) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        T.buffer_store(buffer, value, [*at[:-1], tirx.Ramp(at[-1], 1, self.lanes)])

    def _broadcast(self, value: Any) -> Any:
        from tvm import tirx

        return tirx.Broadcast(value, self.lanes)

    def _splat(self, value: float) -> Any:
        from tvm import tirx

        return tirx.Broadcast(tirx.const(value, "float32"), self.lanes)

    def _lane_index(self) -> Any:
        from tvm import tirx

        return tirx.Ramp(tirx.const(0, "int32"), 1, self.lanes)


def _step_cost(rows: int, vectors: int, target: Target) -> float:
    """Cycles, relative, of one multiply-add of a register tile; see the linear template."""
    multiply_adds, loads = rows * vectors, rows + vectors
    crowded = (multiply_adds + vectors) / target.vector_registers > 0.86
    return (max(multiply_adds, 0.75 * loads, 8.0) + 0.05 * loads) * (1.15 if crowded else 1.0) / multiply_adds


def _ceil(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def _attention(workload: Workload) -> Attention:
    assert isinstance(workload, Attention), f"expected an Attention workload, got {workload}"
    return workload
