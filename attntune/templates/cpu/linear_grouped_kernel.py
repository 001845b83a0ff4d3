"""Linear kernels of weights quantised by groups: unpacked as they are multiplied, or once for all rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attntune.ops.grouped import WEIGHT_GROUP
from attntune.ops.linear import Linear
from attntune.ops.workload import TensorSpec
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu.arithmetic import Arithmetic, Grouped
from attntune.templates.cpu.linear_kernel import LinearKernel, Panels
from attntune.templates.cpu.linear_widened_kernel import FloatPanelsKernel
from attntune.templates.cpu.vectors import chained

#: Up to so many rows, sums by group are not worth a parallel loop.
_SHARED_ROWS = 16


class _Groups(LinearKernel):
    """Groups of the stored weight, in vectors."""

    stored: Any
    """A :class:`Grouped`."""

    def _multiplied(self, operand: dict[str, Any]) -> None:
        """Words as they lie, and x in float32."""

    def _scales(self, part: Any, g: Any) -> tuple[Any, Any]:
        """A step of group ``g`` in a panel, and its minimum; vectors of float32."""
        from tvm import tirx

        def wide(name: str) -> Any:
            return tirx.Cast(self.v.dtype, self.operand[name].vload([part, g, 0], dtype=f"float16x{self.lanes}"))

        return wide("scale"), wide("minimum")

    def _unpacked(self, words: Any, j: int) -> Any:
        """Element ``j`` of a vector of words: 1 + q / 2**bits."""
        return self.stored.unpacked(words, j, self.lanes)

    def _group(self, first: Any, count: int, panels: Panels, element: Callable[[int, Any, Any], None]) -> None:
        """``element(v, k, value)`` for ``count`` elements of every panel from ``first`` on, as :meth:`_unpacked`."""
        stored, weight = self.stored, self.operand["weight"]

        def word(n: Any, elements: int) -> None:
            for v in range(panels.count * self.parts):
                at = [self._part(panels, v), first // stored.group + n, 0]
                words = weight.vload(at, dtype=f"int32x{self.lanes}")
                if self.prefetch:  # as it is stored, from memory, however often what is unpacked is read then
                    self.v.prefetch(weight, [at[0], at[1] + self.prefetch, 0], 2)
                for j in range(elements):
                    element(v, first + n * stored.group + j, self._unpacked(words, j))

        whole, left = divmod(count, stored.group)
        chained(whole, self.unroll, 1, lambda n, c: word(n, stored.group))
        if left:
            word(whole, left)

    def _groups(self, body: Callable[[Any, int], None]) -> None:
        """``body(g, count)`` for every group; the last may have fewer elements."""
        from tvm.tirx.script.builder import ir as T

        whole, left = divmod(self.w.in_features, WEIGHT_GROUP)
        if whole:
            with T.serial(whole) as g:
                body(g, WEIGHT_GROUP)
        if left:
            body(whole, left)


class GroupedLinearKernel(_Groups):
    """Unpacked in registers. Sums of the elements of x, by group, come first: see :meth:`_sums`."""

    def __init__(
        self, w: Linear, target: Target, config: Config, arithmetic: Arithmetic, packed: Mapping[str, TensorSpec]
    ) -> None:
        super().__init__(w, target, config, arithmetic, packed)
        assert isinstance(arithmetic, Grouped), f"expected weights quantised by groups, got {w}"
        self.stored = arithmetic

    def _prepare(self, x: Any) -> None:
        """The sum of the elements of x (rows, in_features) by group of the weight: buffer ``totals`` (rows, groups)."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w, lanes = self.w, self.lanes
        self.totals = T.sblock_alloc_buffer((w.rows, w.weight_groups), "float32")
        whole, left = divmod(w.in_features, WEIGHT_GROUP)
        parts = max(1, WEIGHT_GROUP // lanes)
        with T.parallel(w.rows) if w.rows > _SHARED_ROWS else T.serial(w.rows) as i, T.sblock("totals"):
            T.reads()
            T.writes()
            one = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
            with T.serial(whole) as g:
                value = self.v.load(x, [i, g * WEIGHT_GROUP])
                for part in range(1, parts):
                    value = value + self.v.load(x, [i, g * WEIGHT_GROUP + part * lanes])
                self.v.store(one, [0], self.v.fold(value, lambda a, b: a + b))
                T.buffer_store(self.totals, one[0], [i, g])
            if left:
                T.buffer_store(self.totals, tirx.const(0.0, "float32"), [i, whole])
                with T.serial(left) as k:
                    T.buffer_store(self.totals, self.totals[i, whole] + x[i, whole * WEIGHT_GROUP + k], [i, whole])

    def _factors(self) -> Any:
        """The buffer of x that elements are multiplied by."""
        return self.operand["x"]

    def _first_sum(self, row: Any, g: Any) -> Any:
        """What a group's sum of elements times x begins with, a vector."""
        return self.v.splat(0.0) - self.v.broadcast(self.totals[row, g])

    def _step(self, scale: Any) -> Any:
        """What such a sum is to be multiplied by, a vector."""
        return scale * self.v.splat(float(1 << self.stored.bits))

    def _sums(self, row: Any, rows: int, panels: Panels) -> Callable[[int, int], Any]:
        """The sums of a tile with a weight that is unpacked as it is multiplied.

        A group's sum of (1 + q / 2**bits) · x begins with minus the sum of x, which leaves that of q / 2**bits · x.
        """
        from tvm.tirx.script.builder import ir as T

        wide, x = panels.count * self.parts, self._factors()
        acc = T.sblock_alloc_buffer((rows, wide, self.lanes), "float32", scope="local")
        total = T.sblock_alloc_buffer((rows, wide, self.lanes), "float32", scope="local")
        each = [(a, v) for a in range(rows) for v in range(wide)]

        def group(g: Any, count: int) -> None:
            for a, v in each:
                self.v.store(acc, [a, v, 0], self._first_sum(row + a, g))

            def element(v: int, k: Any, value: Any) -> None:
                for a in range(rows):
                    spread = self.v.broadcast(x[row + a, k])
                    self.v.store(acc, [a, v, 0], self.v.load(acc, [a, v, 0]) + spread * value)

            self._group(g * WEIGHT_GROUP, count, panels, element)
            for v in range(wide):
                scale, minimum = self._scales(self._part(panels, v), g)
                scale, minimum = T.bind(self._step(scale)), T.bind(minimum)
                for a in range(rows):
                    added = self.v.load(acc, [a, v, 0]) * scale + minimum * self.v.broadcast(self.totals[row + a, g])
                    self.v.store(total, [a, v, 0], self.v.load(total, [a, v, 0]) + added)

        for a, v in each:
            self.v.store(total, [a, v, 0], self.v.splat(0.0))
        self._groups(group)
        return lambda a, v: self.v.load(total, [a, v, 0])


class ConvertedLinearKernel(GroupedLinearKernel):
    """Elements masked where they lie and converted; x makes up for their place. Of one row.

    Two instructions an element instead of three, where none combines three operands. (Of more rows LLVM takes 20 s over
    a tile of 5×2.)
    """

    @staticmethod
    def pays(w: Linear, target: Target, arithmetic: Arithmetic) -> bool:
        """Whether it is for this layer."""
        whole = target.lanes("float32") % arithmetic.group == 0
        return w.rows == 1 and whole and not target.has("avx512f")

    def _prepare(self, x: Any) -> None:
        """Also buffer ``scaled`` (1, in_features), x with each element scaled by its weight's place."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        super()._prepare(x)
        lanes = self.lanes
        factors = [tirx.const(self.stored.factor(k % self.stored.group), "float32") for k in range(lanes)]
        pattern = tirx.Shuffle(factors, list(range(lanes)))
        self.scaled = T.sblock_alloc_buffer((1, self.w.in_features), "float32")
        whole, left = divmod(self.w.in_features, lanes)
        with T.sblock("scaled"):
            T.reads()
            T.writes()
            if whole:
                with T.serial(whole) as n:
                    self.v.store(self.scaled, [0, n * lanes], self.v.load(x, [0, n * lanes]) * pattern)
            for k in range(left):
                T.buffer_store(self.scaled, x[0, whole * lanes + k] * factors[k], [0, whole * lanes + k])

    def _unpacked(self, words: Any, j: int) -> Any:
        return self.stored.converted(words, j, self.lanes)

    def _factors(self) -> Any:
        return self.scaled

    def _first_sum(self, row: Any, g: Any) -> Any:
        return self.v.splat(0.0)

    def _step(self, scale: Any) -> Any:
        return scale


class UnpackedLinearKernel(_Groups, FloatPanelsKernel):
    """Unpacked once a column of tiles, into float32 panels."""

    def _fill(self, panels: Panels) -> None:
        from tvm.tirx.script.builder import ir as T

        wide = panels.count * self.parts

        def group(g: Any, count: int) -> None:
            scales = [tuple(map(T.bind, self._scales(self._part(panels, v), g))) for v in range(wide)]
            steps = [T.bind(scale * self.v.splat(float(1 << self.stored.bits))) for scale, _ in scales]

            def element(v: int, k: Any, value: Any) -> None:
                self.v.store(self.floats, [v, k, 0], (value - self.v.splat(1.0)) * steps[v] + scales[v][1])

            self._group(g * WEIGHT_GROUP, count, panels, element)

        self._groups(group)
