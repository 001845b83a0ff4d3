"""Trials on this machine's CUDA device: built side by side, run by a process that is replaced when a kernel fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attntune.errors import TargetError
from attntune.measure.runner import LocalRunner
from attntune.measure.trial import Trial
from attntune.measure.worker import IsolatedProcess


class CudaRunner(LocalRunner):
    """As :class:`LocalRunner`, for targets of kind ``cuda``; that the device is of the target, the caller must know."""

    evaluator = "attntune.measure.cuda_evaluator"

    def _process(self, threads: int, env: Mapping[str, str], preload: tuple[Any, ...]) -> IsolatedProcess:
        # CUDA reserves far more addresses than it uses memory: no limit on address space.
        return IsolatedProcess(
            threads=threads, env=env, preload=(preload,), plugin_paths=self.options.plugin_paths,
            memory_limit_bytes=None,
        )  # fmt: skip

    def _require_local(self, trials: Sequence[Trial]) -> None:
        for target in {trial.target for trial in trials}:
            if target.kind != "cuda":
                raise TargetError(f"expected a CUDA target, got {target.key()}")
