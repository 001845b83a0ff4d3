"""The recurrent kernel written out in TIR; see :mod:`attntune.templates.cuda.recurrent`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from attntune.ops.recurrent import Recurrent
from attntune.ops.recurrent_expression import ending, updated
from attntune.search.space import Config
from attntune.templates.cuda.intrinsics import SharedFloats, opaque
from attntune.templates.cuda.launch import Launch, kernels, when


def shared_bytes(w: Recurrent, config: Config) -> int:
    """Shared memory of a block: states, partial sums, and the weight where it is held."""
    return 4 * sum(_shared_floats(w, config))


def _shared_floats(w: Recurrent, config: Config) -> tuple[int, int, int]:
    rows, parts = config.integer("rows"), config.integer("parts")
    weight = w.gates * w.hidden**2 if config["hold_weight"] else 0
    return rows * len(w.states) * w.hidden, parts * rows * w.gates * _units(w, config), weight


def _units(w: Recurrent, config: Config) -> int:
    """Units that a block computes."""
    return min(config.integer("lanes"), w.hidden) if w.seq == 1 else w.hidden


class RecurrentKernel:
    """One recurrent kernel being written out: a block's states, and what its threads do at each position."""

    def __init__(self, w: Recurrent, config: Config) -> None:
        self.w = w
        self.rows, self.lanes, self.parts = map(config.integer, ("rows", "lanes", "parts"))
        self.floats = _shared_floats(w, config)
        self.threads = self.lanes * self.parts
        self.units = _units(w, config)
        #: Inputs of a part, the last one's may be fewer.
        self.inputs = -(-w.hidden // self.parts)

    def function(self) -> Any:
        """The ``PrimFunc``; its weight is (hidden, gates·hidden)."""
        w = self.w
        grid = [-(-w.batch // self.rows), -(-w.hidden // self.units)]
        packed = {"recurrent_weight": (w.hidden, w.gates * w.hidden)}
        return kernels(w, {}, [Launch(grid, self.threads, self._block)], packed)

    def _block(self, operand: dict[str, Any], blocks: list[Any], thread: Any) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = self.w
        self.operand, self.thread = operand, thread
        self.first_row, self.first_unit = T.bind(blocks[0] * self.rows), T.bind(blocks[1] * self.units)
        self.shared = SharedFloats(sum(self.floats))
        self.sums = T.sblock_alloc_buffer((w.gates * self.rows,), "float32", scope="local")
        zero = tirx.const(0, "int32")
        lengths = []
        for r in range(self.rows):
            row = self.first_row + r
            inside = row < w.batch
            lengths.append(T.bind(tirx.Select(inside, ending(w, operand, T.min(row, w.batch - 1)), zero)))
        if self.floats[-1]:
            self._hold()
        self._begin()
        T.evaluate(T.tvm_storage_sync("shared"))
        longest = lengths[0]
        for length in lengths[1:]:
            longest = T.max(longest, length)
        with T.serial(opaque(longest)) as step:
            self._products()
            T.evaluate(T.tvm_storage_sync("shared"))
            self._gates(step, lengths)
            T.evaluate(T.tvm_storage_sync("shared"))
        self._end(lengths)

    @contextlib.contextmanager
    def _each(self, count: int) -> Iterator[Any]:
        """What is emitted inside runs for each index below ``count``, neighbouring ones by neighbouring threads."""
        from tvm.tirx.script.builder import ir as T

        with T.serial(-(-count // self.threads)) as turn:
            at = T.bind(turn * self.threads + self.thread)
            with when(at < count):
                yield at

    # -- where values lie in shared memory: states, partial sums, the weight -------------------------------------------

    def _state(self, s: int, r: Any, j: Any) -> Any:
        return (s * self.rows + r) * self.w.hidden + j

    def _partial(self, part: Any, r: int, gate: int, unit: Any) -> Any:
        return self.floats[0] + ((part * self.rows + r) * self.w.gates + gate) * self.units + unit

    def _weight(self, k: Any, column: Any) -> Any:
        """A value of the weight, wherever it lies."""
        from tvm.tirx.script.builder import ir as T

        if self.floats[-1]:
            return self.shared.load(sum(self.floats[:2]) + k * (self.w.gates * self.w.hidden) + column)
        return T.bind(self.operand["recurrent_weight"][k, column])

    def _hold(self) -> None:
        """Copy the weight into shared memory."""
        wide = self.w.gates * self.w.hidden
        with self._each(self.w.hidden * wide) as at:
            value = self.operand["recurrent_weight"][at // wide, at % wide]
            self.shared.store(sum(self.floats[:2]) + at, value)

    def _begin(self) -> None:
        """The states before the first position."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = self.w
        for s, name in enumerate(w.states):
            initial = self.operand.get(f"initial_{name}")
            with self._each(self.rows * w.hidden) as at:
                r, j = at // w.hidden, at % w.hidden
                value = tirx.const(0.0, "float32")
                if initial is not None:
                    value = initial[T.min(self.first_row + r, w.batch - 1), j]
                self.shared.store(self._state(s, r, j), value)

    def _products(self) -> None:
        """Partial sums of every gate, sequence and unit: this thread's part of the inputs times its units' weights."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = self.w
        part, lane = T.bind(self.thread // self.lanes), T.bind(self.thread % self.lanes)
        # Nor does the compiler see that the same weights are read at every position, and keep them in registers.
        first = opaque(part * self.inputs)
        count = opaque(T.max(T.min(w.hidden - first, self.inputs), 0))
        with T.serial(-(-self.units // self.lanes)) as chunk:
            unit = T.bind(chunk * self.lanes + lane)
            with when(tirx.all(unit < self.units, self.first_unit + unit < w.hidden)):
                for at in range(w.gates * self.rows):
                    T.buffer_store(self.sums, tirx.const(0.0, "float32"), [at])
                with T.serial(count) as n:
                    k = T.bind(first + n)
                    weights = [self._weight(k, g * w.hidden + self.first_unit + unit) for g in range(w.gates)]
                    for r in range(self.rows):
                        state = self.shared.load(self._state(0, r, k))
                        for g in range(w.gates):
                            at = g * self.rows + r
                            T.buffer_store(self.sums, self.sums[at] + weights[g] * state, [at])
                for r in range(self.rows):
                    for g in range(w.gates):
                        self.shared.store(self._partial(part, r, g, unit), self.sums[g * self.rows + r])

    def _gates(self, step: Any, lengths: list[Any]) -> None:
        """New states and outputs of the sequences that have this position."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = self.w
        x, outputs, bias = self.operand["projected"], self.operand["outputs"], self.operand.get("recurrent_bias")
        for r in range(self.rows):
            with self._each(self.units) as unit:
                j = T.bind(self.first_unit + unit)
                with when(tirx.all(step < lengths[r], j < w.hidden)):
                    row = T.bind(self.first_row + r)
                    position = T.bind(lengths[r] - 1 - step if w.reverse else step)
                    sums = []
                    for g in range(w.gates):
                        value = self.shared.load(self._partial(0, r, g, unit))
                        for part in range(1, self.parts):
                            value = value + self.shared.load(self._partial(part, r, g, unit))
                        sums.append(T.bind(value if bias is None else value + bias[g * w.hidden + j]))
                    given = [T.bind(x[row, position, g * w.hidden + j]) for g in range(w.gates)]
                    before = [self.shared.load(self._state(s, r, j)) for s in range(len(w.states))]
                    fresh = [T.bind(value) for value in updated(w, given, sums, before)]
                    for s, value in enumerate(fresh):
                        self.shared.store(self._state(s, r, j), value)
                    T.buffer_store(outputs, fresh[0], [row, position, j])

    def _end(self, lengths: list[Any]) -> None:
        """The last states, and zeros where a sequence has no position."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = self.w
        for r in range(self.rows):
            row = self.first_row + r
            with self._each(self.units) as unit:
                j = T.bind(self.first_unit + unit)
                with when(tirx.all(row < w.batch, j < w.hidden)):
                    for s, name in enumerate(w.states):
                        T.buffer_store(self.operand[name], self.shared.load(self._state(s, r, j)), [row, j])
                    if w.lengths:
                        with T.serial(T.bind(w.seq - lengths[r])) as n:
                            at = [row, lengths[r] + n, j]
                            T.buffer_store(self.operand["outputs"], tirx.const(0.0, "float32"), at)
