"""Recurrent layers over whole sequences: GRU and LSTM, their input projections done beforehand by one linear layer.

Sources: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (2014), with the reset gate applied
after the product, as in PyTorch, cuDNN and Keras (``reset_after=True``); Hochreiter, Schmidhuber, "Long Short-Term
Memory" (1997), with forget gates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from attntune.ops.recurrent_expression import recurrence
from attntune.ops.workload import (
    TensorSpec,
    Workload,
    example_lengths,
    one_of,
    positive,
    random_operand,
    require,
)

R = TypeVar("R", bound="Recurrent")


@dataclass(frozen=True)
class Recurrent(Workload):
    """What GRU and LSTM share.

    Shapes: projected (batch, seq, gates·hidden), the products of the inputs with their weights, biases added;
    recurrent_weight (gates·hidden, hidden) constant, recurrent_bias (gates·hidden,) constant, one initial value of each
    state (batch, hidden), lengths (batch,) int32 → outputs (batch, seq, hidden), the last value of each state
    (batch, hidden).

    With ``lengths``, a sequence ends after that many positions (none of fewer than 0, all of more than seq): the states
    stay what they are then, and outputs are zero. ``reverse`` goes from a sequence's last position to its first;
    outputs stay at their positions. Without ``initial``, states begin at zero.
    """

    gates: ClassVar[int]
    states: ClassVar[tuple[str, ...]]
    """Names of the states; the first is the output."""

    batch: int
    seq: int
    hidden: int
    reverse: bool = False
    lengths: bool = False
    initial: bool = False
    bias: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        positive(self.op, batch=self.batch, seq=self.seq, hidden=self.hidden)
        one_of(self.op, "dtype", self.dtype, ("float32",))

    @classmethod
    def from_call(cls: type[R], attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> R:
        """From a model's call: projected (batch, seq, gates·hidden), or (batch, gates·hidden) of one position."""
        x, weight = args[0], args[1]
        hidden = weight.shape[1]
        require(
            weight.shape[0] == cls.gates * hidden and x.shape[-1] == weight.shape[0] and len(x.shape) in (2, 3),
            f"{cls.op}: expected projected (batch, seq, {cls.gates}·hidden) and weight ({cls.gates}·hidden, hidden), "
            f"got {x.shape} and {weight.shape}",
        )
        return cls(
            batch=x.shape[0],
            seq=x.shape[1] if len(x.shape) == 3 else 1,
            hidden=hidden,
            reverse=bool(attrs.get("reverse", False)),
            lengths=bool(attrs.get("lengths", False)),
            initial=bool(attrs.get("initial", False)),
            bias=bool(attrs.get("bias", True)),
            dtype=x.dtype,
        )

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Projected, recurrent_weight, then bias, initial states and lengths where the variant has them."""
        wide = self.gates * self.hidden
        specs = [
            TensorSpec("projected", (self.batch, self.seq, wide), self.dtype),
            TensorSpec("recurrent_weight", (wide, self.hidden), self.dtype, constant=True),
        ]
        if self.bias:
            specs.append(TensorSpec("recurrent_bias", (wide,), self.dtype, constant=True))
        if self.initial:
            specs += [TensorSpec(f"initial_{name}", (self.batch, self.hidden), self.dtype) for name in self.states]
        if self.lengths:
            specs.append(TensorSpec("lengths", (self.batch,), "int32"))
        return tuple(specs)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs (batch, seq, hidden), then the last value of each state (batch, hidden)."""
        return (
            TensorSpec("outputs", (self.batch, self.seq, self.hidden), self.dtype),
            *(TensorSpec(name, (self.batch, self.hidden), self.dtype) for name in self.states),
        )

    def compute(self) -> list[Any]:
        """One stage, whose body is the loop over time: no element of it is independent of those before."""
        from tvm import te

        operands = [te.placeholder(spec.shape, spec.dtype, spec.name) for spec in self.inputs()]
        names = [spec.name for spec in (*self.inputs(), *self.outputs())]
        results = te.extern(
            [spec.shape for spec in self.outputs()],
            operands,
            lambda ins, outs: recurrence(self, dict(zip(names, [*ins, *outs], strict=True))),
            name=self.op,
            dtype=[spec.dtype for spec in self.outputs()],
        )
        return [*operands, *results]

    def update(self, gates: Sequence[Any], sums: Sequence[Any], states: Sequence[Any], functions: Any) -> list[Any]:
        """New values of the states at one position, in their order.

        Args:
            gates: what the input projections give each gate.
            sums: what the recurrent products give each gate, recurrent bias included.
            states: the values before.
            functions: something with ``sigmoid`` and ``tanh``, of numbers, arrays or expressions.
        """
        raise NotImplementedError

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float64 NumPy, position by position."""
        given = {spec.name: np.asarray(value) for spec, value in zip(self.inputs(), inputs, strict=True)}
        x = np.asarray(given["projected"], np.float64)
        weight = np.asarray(given["recurrent_weight"], np.float64)
        bias = np.asarray(given.get("recurrent_bias", 0.0), np.float64)
        lengths = np.clip(given["lengths"], 0, self.seq) if self.lengths else np.full(self.batch, self.seq)
        zero = np.zeros((self.batch, self.hidden))
        states = [np.asarray(given.get(f"initial_{name}", zero), np.float64) for name in self.states]
        outputs = np.zeros((self.batch, self.seq, self.hidden))
        every = np.arange(self.batch)
        for step in range(self.seq):
            active = step < lengths
            at = np.where(active, lengths - 1 - step if self.reverse else step, 0)
            sums = states[0] @ weight.T + bias
            fresh = self.update(
                np.split(x[every, at], self.gates, axis=1), np.split(sums, self.gates, axis=1), states, _Functions
            )
            states = [np.where(active[:, None], new, old) for new, old in zip(fresh, states, strict=True)]
            outputs[every[active], at[active]] = states[0][active]
        return (outputs, *states)

    def flops(self) -> int:
        """The recurrent products and ten operations per gate."""
        return self.batch * self.seq * self.gates * self.hidden * (2 * self.hidden + 10)

    def example_inputs(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Ragged lengths: the first sequence full; with three or more, the last empty. What follows an end is NaN."""
        rng = np.random.default_rng(seed)
        operands = [random_operand(rng, spec) for spec in self.inputs()]
        if self.lengths:
            lengths = example_lengths(rng, self.batch, self.seq)
            operands[0][np.arange(self.seq) >= lengths[:, None]] = np.nan
            operands[-1] = lengths
        return tuple(operands)


@dataclass(frozen=True)
class GRUSequence(Recurrent):
    """``r, z = σ(p + s)``, ``n = tanh(p + r ⊙ s)``, ``h' = (1 - z) ⊙ n + z ⊙ h`` with ``s = h · Uᵀ + b``.

    p is what ``projected`` holds for the gate; gates in the order r, z, n (PyTorch's; Keras stores z, r, n).
    """

    op: ClassVar[str] = "gru_sequence"
    gates: ClassVar[int] = 3
    states: ClassVar[tuple[str, ...]] = ("state",)

    def update(self, gates: Sequence[Any], sums: Sequence[Any], states: Sequence[Any], functions: Any) -> list[Any]:
        """See :class:`Recurrent`."""
        reset = functions.sigmoid(gates[0] + sums[0])
        update = functions.sigmoid(gates[1] + sums[1])
        new = functions.tanh(gates[2] + reset * sums[2])
        return [new + update * (states[0] - new)]


@dataclass(frozen=True)
class LSTMSequence(Recurrent):
    """``i, f, o = σ(p + s)``, ``g = tanh(p + s)``, ``c' = f ⊙ c + i ⊙ g``, ``h' = o ⊙ tanh(c')``, ``s = h · Uᵀ + b``.

    Gates in the order i, f, g, o (PyTorch's and Keras's). States: state h, then cell c.
    """

    op: ClassVar[str] = "lstm_sequence"
    gates: ClassVar[int] = 4
    states: ClassVar[tuple[str, ...]] = ("state", "cell")

    def update(self, gates: Sequence[Any], sums: Sequence[Any], states: Sequence[Any], functions: Any) -> list[Any]:
        """See :class:`Recurrent`."""
        total = [gate + summed for gate, summed in zip(gates, sums, strict=True)]
        kept = functions.sigmoid(total[1]) * states[1]
        cell = kept + functions.sigmoid(total[0]) * functions.tanh(total[2])
        return [functions.sigmoid(total[3]) * functions.tanh(cell), cell]


class _Functions:
    """Float64 NumPy."""

    @staticmethod
    def sigmoid(x: np.ndarray) -> np.ndarray:
        """Logistic function by tanh, which overflows nowhere."""
        return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))

    tanh = staticmethod(np.tanh)
