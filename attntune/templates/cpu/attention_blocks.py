"""Attention kernels on CPUs: which queries and keys each task has, and where their elements are."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from attntune.ops.attention import Attention
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu.tasks import share_out
from attntune.templates.cpu.vectors import Vectors

LOG2_E = math.log2(math.e)
#: Rows of the tallest score tile.
TALLEST = 14


def held_dims(head_dim: int, target: Target) -> int:
    """Vectors of the head that one pass over the values accumulates; wide heads take several equal passes.

    Of AVX2's 16 registers 3 × 4 rows hold sums. (12 heads of 64 and 128, Zen 3: 3 to 10 % less time than with 2 × 4.)
    """
    dims = math.ceil(head_dim / target.lanes("float32"))
    return math.ceil(dims / math.ceil(dims / (4 if target.vector_registers >= 32 else 3)))


def tile_for(vectors: int, key_tile: int, whole: int) -> int:
    """Keys in a score tile of ``vectors`` query vectors, where one of ``whole`` vectors has ``key_tile``."""
    return min(TALLEST, key_tile * whole // vectors)


def _odd(value: int) -> int:
    return value | 1


class AttentionBlocks:
    """A kernel being written out, up to its blocks of queries: each is one task."""

    start: Any
    """First key of the block of keys at hand."""
    keys: Any
    """How many keys it has."""
    qt: Any
    """The block's queries, transposed: see :meth:`_q`."""
    p: Any
    """Scores, then their exponentials: see :meth:`_s`."""
    terms: Any
    """What every query adds to a key's score."""
    tallest = TALLEST
    """Rows of the tallest score tile of such a kernel."""

    def __init__(self, w: Attention, target: Target, config: Config) -> None:
        self.w = w
        self.v = Vectors(target.lanes("float32"))
        self.lanes = self.v.lanes
        self.cores = target.cores
        #: Whether the registers are AVX2's 16, which hold little beside a tile's sums.
        self.few_registers = target.vector_registers < 32
        self.vectors = config.integer("query_vectors")
        self.block_vectors = self.vectors * config.integer("query_tiles")
        self.key_block = min(config.integer("key_block"), w.kv_len)
        self.key_tile = config.integer("key_tile")
        self.out_rows = config.integer("out_rows")
        self.heads_inner = bool(config["heads_inner"])
        self.copy_values = bool(config.get("copy_values", False))
        self.dims_held = held_dims(w.head_dim, target)
        self.dim_vectors = math.ceil(w.head_dim / self.lanes)
        #: From one query vector to the next, in elements; an odd number of vectors, so not a multiple of 4 KiB.
        self.qt_stride = (w.head_dim + 1) * self.lanes
        self.p_stride = _odd(self.key_block + self.tallest) * self.lanes
        #: Query vectors whose scores are kept at a time.
        self.p_vectors = self.block_vectors
        #: Scores that are more than a sum of the product, a term for each key and one for each pair.
        self.general = bool(w.softcap or w.score_mod)
        self.key_terms = not self.general and (w.mask or w.alibi or bool(w.bias_heads and w.bias_q == 1))
        self.pair_terms = not self.general and bool(w.bias_heads and w.bias_q != 1)
        #: Whether the queries of a sequence are fewer than the rows of its operands.
        self.short = w.ragged or w.lengths == "qkv"
        self.whole_vectors = math.ceil(w.q_len / self.lanes)
        self.blocks = math.ceil(self.whole_vectors / self.block_vectors)

    def function(self) -> Any:
        """The ``PrimFunc``."""
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
                if w.ragged:
                    # Each sequence rounds up to whole blocks, and so do the rows past the last.
                    blocks = self.blocks + w.batch + 1
                    share_out(
                        w.heads * blocks, self.cores, lambda task: self._ragged_block(task // blocks, task % blocks)
                    )
                else:
                    share_out(w.batch * w.heads * self.blocks, self.cores, self._padded_task)
        return builder.get()

    def _padded_task(self, task: Any) -> None:
        w = self.w
        if w.lengths == "qkv":
            # Cores share heads: every core then has the same part of each sequence.
            head, b, block = task // (w.batch * self.blocks), task // self.blocks % w.batch, None
        elif self.heads_inner:
            head, b, block = task % w.heads, task // (w.heads * self.blocks), task // w.heads
        else:
            head, b, block = task // self.blocks % w.heads, task // (w.heads * self.blocks), None
        self._padded_block(b, head, (task if block is None else block) % self.blocks)

    # -- which queries and keys a block has ----------------------------------------------------------------------------

    def _padded_block(self, b: Any, h: Any, block: Any) -> None:
        """Block ``block`` of a sequence of at most ``q_len`` queries."""
        from tvm.tirx.script.builder import ir as T

        w, total = self.w, self.whole_vectors
        # Vectors are shared out evenly: no block is left with one that fills no tile.
        start = self._known(block * total // self.blocks)
        if total % self.blocks:
            count = self._known((block + 1) * total // self.blocks - start)
            counts = {total // self.blocks, total // self.blocks + 1}
        else:
            count = total // self.blocks
            counts = {count}
        first = self._known(start * self.lanes)
        self.counts = counts
        length = self._known(self.operand["lengths"][b]) if w.lengths else w.kv_len
        if w.lengths == "qkv":
            rows = (
                self._known(T.min(count * self.lanes, w.q_len - first)) if w.q_len % self.lanes else count * self.lanes
            )
            queries = self._known(T.max(T.min(rows, length - first), 0))
            count = self._known((queries + (self.lanes - 1)) // self.lanes)
            self.counts = set(range(self.block_vectors + 1))
        else:
            queries = (
                self._known(T.min(count * self.lanes, w.q_len - first)) if w.q_len % self.lanes else count * self.lanes
            )
        offset = w.causal_offset
        if w.lengths == "kv":
            offset = self._known(length + (w.causal_offset - w.q_len))
        self._place(b, h, first, queries, count, length, offset, 0)
        self._block()
        if w.lengths == "qkv":
            with T.serial(self._known(rows - queries)) as i:
                self._zero_row(queries + i)

    def _ragged_block(self, h: Any, block: Any) -> None:
        """Block ``block`` of a head, counted over all sequences; past the last sequence, rows of zeros."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, size = self.w, self.block_vectors * self.lanes
        offsets = self.operand["offsets"]
        # Filled in by a scan of the sequences: which one, where it begins and ends, and the block within it.
        found = T.sblock_alloc_buffer((5,), "int32", scope="local")
        for at in range(5):
            T.buffer_store(found, tirx.const(0, "int32"), [at])
        T.buffer_store(found, block, [4])
        with T.serial(w.batch + 1) as b:
            start = self._known(tirx.Select(b < w.batch, offsets[T.min(b, w.batch)], offsets[w.batch]))
            end = self._known(tirx.Select(b < w.batch, offsets[T.min(b + 1, w.batch)], tirx.const(w.q_len, "int32")))
            blocks = self._known((end - start + (size - 1)) // size)
            with T.If(tirx.all(found[4] >= 0, found[4] < blocks)), T.Then():
                for at, value in enumerate((b, start, end, found[4])):
                    T.buffer_store(found, value, [at])
            T.buffer_store(found, found[4] - blocks, [4])
        b, row, end, within = (self._known(found[at]) for at in range(4))
        first = self._known(within * size)
        rows = self._known(T.max(T.min(end - row - first, size), 0))
        with T.If(b < w.batch):
            with T.Then():
                self.counts = set(range(self.block_vectors + 1))
                count = self._known((rows + (self.lanes - 1)) // self.lanes)
                self._place(b, h, first, rows, count, self._known(end - row), 0, row)
                self._block()
            with T.Else():
                self._place(0, h, first, 0, 0, 0, 0, row)
                with T.serial(rows) as i:
                    self._zero_row(i)

    def _place(self, b: Any, h: Any, first: Any, queries: Any, count: Any, length: Any, offset: Any, row: Any) -> None:
        """Remember the block's sequence ``b`` (from ``row`` on, ``length`` keys), head, and ``queries`` from ``first``.

        ``count`` is the number of query vectors, ``offset`` the position of query 0 among the keys.
        """
        w = self.w
        self.b, self.h, self.first, self.row = b, h, first, row
        self.queries, self.count, self.length, self.offset = queries, count, length, offset
        names = ("qkv",) * 3 if w.packed else ("query", "key", "value")
        self.query, self.key, self.value = (self.operand[name] for name in names)
        q_width, kv_width = w.heads * w.head_dim, w.kv_heads * w.head_dim
        self.kv_head = h // (w.heads // w.kv_heads)
        self.key_column, self.value_column = (q_width, q_width + kv_width) if w.packed else (0, 0)

    def _seen(self, query: Any, count: Any) -> tuple[Any, Any]:
        """Keys from and up to which any of ``count`` queries of the block, from ``query`` on, may attend to."""
        from tvm.tirx.script.builder import ir as T

        w = self.w
        if not w.causal:
            return 0, self.length
        at = self.first + query + self.offset
        high = T.min(at + count, self.length)
        return (T.max(at + (1 - w.window), 0) if w.window else 0), high

    def _within(self, query: Any, count: Any) -> tuple[Any, Any]:
        """As ``_seen``, counted from the start of the block of keys and kept inside it."""
        from tvm.tirx.script.builder import ir as T

        if not self.w.causal:
            return 0, self.keys
        low, high = self._seen(query, count)
        high = T.max(T.min(high - self.start, self.keys), 0)
        return (T.max(low - self.start, 0) if self.w.window else 0), high

    def _known(self, value: Any) -> Any:
        """An int32 ``value`` computed once, and kept where TVM's simplifier cannot see it.

        It expands nested names: with the bounds of padded sequences or of windows among them that took minutes. LLVM
        sees through the cell, which is on the stack.
        """
        from tvm.tirx.script.builder import ir as T

        cell = T.sblock_alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(cell, value, [0])
        return cell[0]

    @abstractmethod
    def _block(self) -> None:
        """One block of queries, which :meth:`_place` has told."""

    @abstractmethod
    def _zero_row(self, i: Any) -> None:
        """Row ``i`` of the block is past the end of its sequence."""

    # -- where elements are --------------------------------------------------------------------------------------------

    def _q(self, vector: Any, d: Any, lane: Any = 0) -> list[Any]:
        """Where component ``d`` of a vector of transposed queries is."""
        return [vector * self.qt_stride + d * self.lanes + lane]

    def _s(self, vector: Any, j: Any, lane: Any = 0) -> list[Any]:
        """Where the score of key ``j`` of the block is, for a vector of queries."""
        return [vector * self.p_stride + j * self.lanes + lane]

    def _at(self, row: Any, d: Any) -> list[Any]:
        """Index of an element of a query or a result of this block's sequence and head."""
        return self._of_head("query", self.h, row, d)

    def _key_at(self, row: Any, d: Any) -> list[Any]:
        """Index of an element of a key."""
        return self._of_head("key", self.kv_head, row, self.key_column + d)

    def _value_at(self, row: Any, d: Any) -> list[Any]:
        """Index of an element of a value."""
        return self._of_head("value", self.kv_head, row, self.value_column + d)

    def _of_head(self, name: str, head: Any, row: Any, d: Any) -> list[Any]:
        w = self.w
        if w.heads_apart(name):
            return [self.b, head, row, d]
        at = head * w.head_dim + d
        return [self.row + row, at] if w.ragged else [self.b, row, at]
