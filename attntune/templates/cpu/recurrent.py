"""GRU and LSTM sequences on CPUs: the recurrent part in one kernel.

The weight is packed once to (hidden/lanes, hidden, gates·lanes): a panel holds, input by input, a vector of each gate.

Loop nest, outermost first:

    parallel  tiles of ``tile_rows`` sequences; the states of a tile stay in the first-level cache
    serial    positions
    serial    units, ``tile_vectors`` panels at a time
    serial    inputs, ``k_unroll`` · ``chains`` at a time
    unrolled  chains × tile_rows × (tile_vectors · gates) accumulators, in registers
    then the gates of all units, vector by vector: several panels' polynomials overlap

The weights of a layer of 256 units (768 KiB) stay in the second-level cache from position to position. Cores share out
sequences, never units: meeting at every position would cost more than it gains at these sizes.

Default configs, hot, 2 cores of Zen 4 (``torch.nn.GRU``, input projection included, on the same busy machine):

    batch 1, seq 32, hidden 256   239-266 µs, 50 GFLOP/s: the weight streams from the second-level cache   (1.2-1.9 ms)
    batch 8, seq 32, hidden 256   639-694 µs, 150 GFLOP/s                                                 (4.6-4.9 ms)
    batch 1, seq 25, hidden 64    13 µs, 47 GFLOP/s: the gates' polynomials one after another             (0.3-0.5 ms)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from attntune.ops.recurrent import Recurrent
from attntune.ops.workload import TensorSpec, Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cpu.recurrent_kernel import RecurrentKernel
from attntune.templates.template import Packing, ScheduleTemplate


class GRUSequenceCPU(ScheduleTemplate):
    """Register-tiled recurrent products, then the gates."""

    op: ClassVar[str] = "gru_sequence"
    kind: ClassVar[str] = "cpu"

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Tile height and width, sums side by side, unrolling."""
        w = self._recurrent(workload)
        panels = math.ceil(w.hidden / target.lanes("float32"))
        knobs = [
            Knob("tile_rows", tuple(t for t in (1, 2, 3, 4, 6, 8) if t <= w.batch)),
            Knob("tile_vectors", tuple(v for v in (1, 2, 3) if v <= panels)),
            Knob("chains", (1, 2, 4)),
            Knob("k_unroll", (1, 2, 4)),
        ]

        def fits(config: Config) -> bool:
            rows, vectors, chains = (config.integer(name) for name in ("tile_rows", "tile_vectors", "chains"))
            wide = vectors * w.gates
            return rows == chains == vectors == 1 or rows * wide * chains + wide < target.vector_registers

        return ConfigSpace(knobs, [fits])

    def default(self, workload: Workload, target: Target) -> Config:
        """Tiles that occupy every core, with about twice the sums that hide an addition's latency."""
        w = self._recurrent(workload)
        panels = math.ceil(w.hidden / target.lanes("float32"))

        def cost(config: Config) -> tuple[float, str]:
            rows, vectors, chains = (config.integer(name) for name in ("tile_rows", "tile_vectors", "chains"))
            rounds = math.ceil(math.ceil(w.batch / rows) / target.cores)
            sums = rows * vectors * w.gates * chains
            waste = math.ceil(panels / vectors) * vectors / panels
            step = max(rows * vectors, 0.75 * (vectors + rows / w.gates), 8 / w.gates / chains) / vectors
            return rounds * step * waste + 0.001 * abs(sums - 12) + 0.01 * abs(
                config.integer("k_unroll") - 2
            ), config.key()

        return min(self.space(workload, target), key=cost)

    def pack(self, workload: Workload, target: Target) -> Mapping[str, Packing]:
        """Weight to (panels, hidden, gates·lanes), bias to (panels, gates·lanes); zeros past the last unit."""
        w = self._recurrent(workload)
        lanes = target.lanes("float32")
        panels = math.ceil(w.hidden / lanes)

        def in_panels(values: np.ndarray) -> np.ndarray:
            """(gates·hidden, …) → (panels, …, gates·lanes)."""
            rest = values.shape[1:]
            padded = np.zeros((w.gates, panels * lanes, *rest), np.float32)
            padded[:, : w.hidden] = values.reshape(w.gates, w.hidden, *rest)
            split = padded.reshape(w.gates, panels, lanes, *rest)
            moved = np.moveaxis(split, (0, 2), (-2, -1))
            return np.ascontiguousarray(moved).reshape(panels, *rest, w.gates * lanes)

        shape = (panels, w.hidden, w.gates * lanes)
        packings = {"recurrent_weight": _packing("recurrent_weight", shape, in_panels)}
        if w.bias:
            packings["recurrent_bias"] = _packing("recurrent_bias", (panels, w.gates * lanes), in_panels)
        return packings

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description of the loop nest."""
        import tvm

        return tvm.IRModule({"main": RecurrentKernel(self._recurrent(workload), target, config).function()})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, registers in use, sums side by side, balance."""
        w = self._recurrent(workload)
        rows, wide = config.integer("tile_rows"), config.integer("tile_vectors") * w.gates
        tiles = math.ceil(w.batch / rows)
        return {
            **super().features(workload, target, config),
            "registers": (rows * wide * config.integer("chains") + wide) / target.vector_registers,
            "sums": float(rows * wide * config.integer("chains")),
            "intensity": rows * wide / (rows + wide),
            "imbalance": math.ceil(tiles / target.cores) * target.cores / tiles,
            "weight_in_l2": 4 * w.gates * w.hidden**2 / target.l2_bytes,
            "log_hidden": math.log2(w.hidden),
        }

    def _recurrent(self, workload: Workload) -> Recurrent:
        assert isinstance(workload, Recurrent), f"expected {self.op}, got {workload}"
        assert workload.op == self.op, f"expected {self.op}, got {workload}"
        return workload


class LSTMSequenceCPU(GRUSequenceCPU):
    """The same with four gates and two states."""

    op: ClassVar[str] = "lstm_sequence"


def _packing(name: str, shape: tuple[int, ...], apply: Callable[[np.ndarray], np.ndarray]) -> Packing:
    return Packing(TensorSpec(name, shape, "float32", constant=True), apply)
