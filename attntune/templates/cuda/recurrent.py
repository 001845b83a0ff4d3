"""GRU and LSTM sequences and cells on CUDA: a block carries its sequences from position to position.

    blockIdx.x    blocks of ``rows`` sequences, whose states stay in shared memory
    blockIdx.y    of a single position, ``lanes`` units each: nothing has to meet there
    serial        positions, as many as the longest of the block's sequences has
      threadIdx.x ``lanes`` units by ``parts`` of the inputs: sums of every gate and sequence in registers
      barrier     partial sums meet in shared memory
      threadIdx.x sequences and units: the gates, the new states, the outputs
      barrier

The weight is packed to (hidden, gates·hidden), so that neighbouring threads read neighbouring elements. It comes from
the second-level cache once a position, or (``hold_weight``) stays in shared memory, where it fits: 48 KiB for a GRU of
64 units. Blocks share out sequences, never the units of one: meeting in device memory at every position would cost more
than it gains at the sizes of the models here.

Ladder: none yet, for nothing here ran on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from attntune.ops.recurrent import Recurrent
from attntune.ops.workload import TensorSpec, Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.target import Target
from attntune.templates.cuda.recurrent_kernel import RecurrentKernel, shared_bytes
from attntune.templates.template import Packing, ScheduleTemplate

_WARP = 32
#: Threads of a block that the default aims at: enough loads in flight to stream from the second-level cache.
_DEFAULT_THREADS = 512


class GRUSequenceCUDA(ScheduleTemplate):
    """Recurrent products and gates of one position after another; every variant."""

    op: ClassVar[str] = "gru_sequence"
    kind: ClassVar[str] = "cuda"

    def space(self, workload: Workload, target: Target) -> ConfigSpace:
        """Sequences of a block, its units and parts of the inputs side by side, and where the weight lies."""
        w = self._recurrent(workload)
        knobs = [
            Knob("rows", tuple(n for n in (1, 2, 4) if n < 2 * w.batch)),
            Knob("lanes", tuple(n for n in (32, 64, 128, 256, 512) if n == _WARP or n < 2 * w.hidden)),
            Knob("parts", tuple(n for n in (1, 2, 4, 8) if n <= w.hidden)),
            Knob("hold_weight", (False,) if w.seq == 1 else (False, True)),
        ]

        def fits(config: Config) -> bool:
            threads = config.integer("lanes") * config.integer("parts")
            if (
                threads == _WARP < w.hidden
            ):  # a single warp with several units: ptxas keeps so many weights that it spills
                return False
            return threads <= target.threads_per_block and shared_bytes(w, config) <= target.shared_memory_bytes

        return ConfigSpace(knobs, [fits])

    def default(self, workload: Workload, target: Target) -> Config:
        """As few sequences a block as SMs can take at once, about 512 threads, the weight held where it fits."""
        w = self._recurrent(workload)

        def cost(config: Config) -> tuple[float | str, ...]:
            lanes, parts = config.integer("lanes"), config.integer("parts")
            rounds = math.ceil(math.ceil(w.batch / config.integer("rows")) / target.sm_count)
            blocks = math.ceil(w.hidden / lanes) if w.seq == 1 else 1
            wanted = _DEFAULT_THREADS if blocks == 1 else min(_DEFAULT_THREADS, _WARP * 8)
            idle = math.ceil(w.hidden / lanes) * lanes / w.hidden
            narrow = lanes if w.seq == 1 else 0  # units of one position are shared out between SMs
            return (
                rounds, not config["hold_weight"], config.integer("rows"), round(idle, 2),
                abs(math.log2(lanes * parts / wanted)), narrow, config.key(),
            )  # fmt: skip

        return min(self.space(workload, target), key=cost)

    def pack(self, workload: Workload, target: Target) -> Mapping[str, Packing]:
        """Weight (gates·hidden, hidden) to (hidden, gates·hidden)."""
        w = self._recurrent(workload)
        spec = TensorSpec("recurrent_weight", (w.hidden, w.gates * w.hidden), w.dtype, constant=True)
        return {"recurrent_weight": Packing(spec, lambda values: np.ascontiguousarray(values.T))}

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm

        return tvm.IRModule({"main": RecurrentKernel(self._recurrent(workload), config).function()})

    def features(self, workload: Workload, target: Target, config: Config) -> dict[str, float]:
        """Knobs, threads, units of a thread, shared memory, waves and sizes."""
        w = self._recurrent(workload)
        lanes, parts = config.integer("lanes"), config.integer("parts")
        chunks = math.ceil(w.hidden / lanes)
        blocks = math.ceil(w.batch / config.integer("rows")) * (chunks if w.seq == 1 else 1)
        return {
            **super().features(workload, target, config),
            "threads": float(lanes * parts),
            "chunks": 1.0 if w.seq == 1 else float(chunks),
            "padding": chunks * lanes / w.hidden,
            "shared": shared_bytes(w, config) / target.shared_memory_bytes,
            "waves": blocks / target.sm_count,
            "log_seq": math.log2(w.seq),
            "log_hidden": math.log2(w.hidden),
        }

    def _recurrent(self, workload: Workload) -> Recurrent:
        assert isinstance(workload, Recurrent), f"expected a recurrent workload, got {workload}"
        assert workload.op == self.op, f"expected a workload of {self.op!r}, got {workload}"
        return workload


class LSTMSequenceCUDA(GRUSequenceCUDA):
    """The same with four gates and two states."""

    op: ClassVar[str] = "lstm_sequence"
