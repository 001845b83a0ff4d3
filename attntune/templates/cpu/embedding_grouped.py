"""Embedding from a table quantised by groups, on CPUs.

The table lies as a linear layer's weight does (``linear.py``), so that a vocabulary projection that is tied to it
shares its copy. A token's words are then a vector register apart: a cache line each, of which a decoding step reads a
hundred or two. Words are unpacked one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from attntune.ops.embedding import Embedding
from attntune.ops.grouped import GROUPED, WEIGHT_GROUP
from attntune.ops.linear import Linear
from attntune.ops.workload import Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cpu.elements import Elements
from attntune.templates.cpu.linear import LinearCPU
from attntune.templates.cpu.moves import MoveTemplate, Operands
from attntune.templates.template import Packing


class EmbeddingGroupedCPU(MoveTemplate):
    """One gather for each token, word by word."""

    op: ClassVar[str] = "embedding"

    def supports(self, workload: Workload, target: Target) -> bool:
        """Quantised tables."""
        return bool(_embedding(workload).weight_dtype)

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Whether to use more than one core."""
        return ConfigSpace([Knob("parallel", (False, True))])

    def default(self, workload: Workload, target: Target) -> Config:
        """Several cores unless the work is done before they have started."""
        return Config.of(parallel=self.uses_cores(workload, target))

    def rows(self, workload: Workload) -> int:
        """Tokens."""
        return _embedding(workload).batch * _embedding(workload).seq

    def pack(self, workload: Workload, target: Target) -> Mapping[str, Packing]:
        """The table as the weight of a linear layer from features to the vocabulary."""
        w = _embedding(workload)
        layer = Linear(1, w.features, w.vocab, bias=False, weight_dtype=w.weight_dtype)
        packings = LinearCPU().pack(layer, target)
        return {"table": packings["weight"], "scale": packings["scale"], "minimum": packings["minimum"]}

    def row(self, workload: Workload, elements: Elements, operands: Operands, row: Any) -> None:
        """``y = scale · table[id] + position[p]``."""
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        w = _embedding(workload)
        bits = GROUPED[w.weight_dtype]
        in_word = 32 // bits
        lanes = int(operands["scale"].shape[-1])
        b, i = row // w.seq, row % w.seq
        token = T.bind(T.Cast("int32", operands["ids"][b, i]))
        panel, lane = T.bind(token // lanes), T.bind(token % lanes)
        if w.positions:
            at = T.bind(T.max(T.min(w.position_of(operands.get("lengths"), b, i), w.positions - 1), 0))

        def group(g: Any, count: int) -> None:
            scale, minimum = (
                T.bind(T.Cast("float32", operands[name][panel, g, lane]) * tirx.const(w.scale, "float32"))
                for name in ("scale", "minimum")
            )

            def word(n: Any, held: int) -> None:
                first = g * WEIGHT_GROUP + n * in_word
                whole = T.bind(operands["table"][panel, g * (WEIGHT_GROUP // in_word) + n, lane])
                for j in range(held):
                    steps = (whole >> tirx.const(j * bits, "int32")) & tirx.const((1 << bits) - 1, "int32")
                    value = T.Cast("float32", steps) * scale + minimum
                    if w.positions:
                        value = value + elements.load(operands["position"], [at, first + j], 1)
                    elements.store(operands["y"], [b, i, first + j], value, 1)

            words, left = divmod(count, in_word)
            with T.serial(words) as n:
                word(n, in_word)
            if left:
                word(words, left)

        groups, left = divmod(w.features, WEIGHT_GROUP)
        if groups:
            with T.serial(groups) as g:
                group(g, WEIGHT_GROUP)
        if left:
            group(groups, left)


def _embedding(workload: Workload) -> Embedding:
    assert isinstance(workload, Embedding), f"expected an Embedding workload, got {workload}"
    return workload
