"""Compiled kernels by workload: in this process, then in the user's cache directory, else built now.

CACHE/kernels/
  KEY.so     the shared library
  KEY.json   what it was built from and by what, how far it is from its reference, and the sha256 of KEY.so
  KEY.lock   held while one process builds it

KEY is a digest of the workload, the target, the template and its config, the versions of attntune and TVM, and the
sources that kernels are made from. The JSON file is written last, so a library without one, or one whose sum differs,
is built again. A kernel gets here only after it matched its float64 reference, in a process of its own; building
happens in another, so that neither a crash nor TVM's compiler reaches the process that asks.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from attntune.database.query import Choice, Database
from attntune.database.record import Status
from attntune.errors import AttntuneError, CompileError
from attntune.host import available_cpus, host_features, host_triple, physical_cores, user_cache_dir
from attntune.measure.builder import Built
from attntune.measure.evaluator import Evaluation
from attntune.measure.machine import cpu_model
from attntune.measure.threads import POOL_ENV, load_runtime
from attntune.measure.trial import Trial
from attntune.measure.worker import IsolatedProcess
from attntune.ops import Workload
from attntune.runtime.artifact import sha256
from attntune.target import Target, native
from attntune.templates import GENERIC, ScheduleTemplate, template_for

_BUILD_TIMEOUT_SECS = 120.0
_CHECK_TIMEOUT_SECS = 600.0
_IDLE_SECS = 30.0
"""After so long without a build, the processes that build and check are ended."""


class KernelCache:
    """Kernels for this machine. Safe with many threads and many processes.

    Args:
        folder: where compiled kernels are kept; ``kernels`` in the user's cache directory by default.
        target: the machine they are for; by default this one, with all of its physical cores.
        database: where schedules come from; by default those that attntune ships.
        process: starts the processes that build and check.
    """

    def __init__(
        self, folder: Path | None = None, *, target: Target | None = None, database: Database | None = None,
        process: Callable[..., IsolatedProcess] = IsolatedProcess,
    ) -> None:  # fmt: skip
        self._process = process
        self._folder = folder
        self._target = target
        self._database = database
        self._functions: dict[Workload, Any] = {}
        self._lock = threading.Lock()
        self._workers: tuple[IsolatedProcess, IsolatedProcess] | None = None
        self._last_build = 0.0

    def function(self, workload: Workload) -> Any:
        """The kernel ``main(*inputs, *outputs)``, to be called on the kernel thread with ``self.target.cores``.

        Raises:
            CompileError: no kernel for it could be built that matches its reference.
        """
        found = self._functions.get(workload)
        if found is not None:
            return found
        with self._lock:
            if workload not in self._functions:
                self._functions[workload] = self._load(workload)
            return self._functions[workload]

    def library(self, workload: Workload) -> tuple[Path, dict[str, Any]]:
        """The shared library of a kernel, built if need be, and what is known of it: template, config, source, errors.

        Raises:
            CompileError: see :meth:`function`.
        """
        with self._lock:
            return self._library(workload)

    def key(self, workload: Workload) -> str:
        """What the library of a kernel is found by: it changes with everything that may change the kernel."""
        template, choice = self._chosen(workload)
        return self._key(workload, template, choice)

    def has_template(self, workload: Workload) -> bool:
        """Whether a template made for this operator schedules it, rather than the generic one."""
        return template_for(workload, self.target) not in GENERIC.values()

    @functools.cached_property
    def target(self) -> Target:
        """The machine kernels are for."""
        return self._target or self._host_target()

    @functools.cached_property
    def folder(self) -> Path:
        """Where kernels are kept; a folder of this process alone where the user's cannot be written."""
        folder = self._folder or user_cache_dir() / "kernels"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            self._own_folder = tempfile.TemporaryDirectory(prefix="attntune-kernels-")
            return Path(self._own_folder.name)

    def clear(self) -> int:
        """Forget every kernel, in this process and on disk; returns how many there were on disk."""
        with self._lock:
            self._functions.clear()
            libraries = list(self.folder.glob("*.so"))
            # The locks stay: a process may be waiting for one.
            for path in (*self.folder.glob("*.json"), *libraries):
                path.unlink(missing_ok=True)
            return len(libraries)

    def forget_workers(self) -> None:
        """Start afresh, as a forked child must: the processes that build belong to its parent."""
        self._lock = threading.Lock()
        self._workers = None

    # -- one kernel ----------------------------------------------------------------------------------------------------

    def _load(self, workload: Workload) -> Any:
        library, _ = self._library(workload)
        return load_runtime().load_module(str(library)).get_function("main")

    def _library(self, workload: Workload) -> tuple[Path, dict[str, Any]]:
        template, choice = self._chosen(workload)
        key = self._key(workload, template, choice)
        manifest = self._manifest(key)
        if manifest is None:
            with FileLock(self.folder / f"{key}.lock"):
                manifest = self._manifest(key)  # another process may have built it meanwhile
                if manifest is None:
                    manifest = self._build(workload, template, choice, key)
        return self.folder / f"{key}.so", manifest

    def _chosen(self, workload: Workload) -> tuple[ScheduleTemplate, Choice]:
        if self._database is None:
            self._database = Database()
        template = template_for(workload, self.target)
        return template, self._database.lookup(workload, self.target, template)

    def _key(self, workload: Workload, template: ScheduleTemplate, choice: Choice) -> str:
        parts = (
            workload.key(), json.dumps(self.target.to_json(), sort_keys=True), template.reference_name(),
            choice.config.key(), *package_versions(), sources_digest(),
        )  # fmt: skip
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def _manifest(self, key: str) -> dict[str, Any] | None:
        """What is known of a library on disk; None when it is missing, damaged or incomplete."""
        try:
            manifest = json.loads((self.folder / f"{key}.json").read_text())
            whole = manifest["sha256"] == sha256(self.folder / f"{key}.so")
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return dict(manifest) if whole else None

    def _build(self, workload: Workload, template: ScheduleTemplate, choice: Choice, key: str) -> dict[str, Any]:
        """Build with the chosen config, or with the default where that config gives no right kernel."""
        default = template.default(workload, self.target)
        problems = []
        with tempfile.TemporaryDirectory(prefix="build-", dir=self.folder) as scratch:
            path = Path(scratch) / f"{key}.so"
            for config in dict.fromkeys((choice.config, default)):
                trial = Trial(workload, self.target, template.reference_name(), config, is_default=config == default)
                try:
                    build_secs, checked = self._build_and_check(trial, path)
                except AttntuneError as error:
                    problems.append(f"{config}: {str(error)[:400]}")
                    continue
                if checked.status is not Status.CORRECT:
                    problems.append(f"{config}: {checked.message}")
                    continue
                attntune, tvm = package_versions()
                manifest = {
                    "workload": json.loads(workload.key()), "target": self.target.to_json(),
                    "template": template.reference_name(), "config": config.to_json(), "source": choice.source,
                    "from": choice.from_, "rejected": problems, "versions": {"attntune": attntune, "tvm": tvm},
                    "max_abs_error": checked.max_abs_error, "max_rel_error": checked.max_rel_error,
                    "build_secs": build_secs, "sha256": sha256(path),
                }  # fmt: skip
                described = path.with_suffix(".json")
                described.write_text(json.dumps(manifest, indent=1))
                for file in (path, described):
                    file.replace(self.folder / file.name)
                return manifest
        raise CompileError(f"no kernel for {workload} on {self.target.key()} is right; tried {'; '.join(problems)}")

    def _build_and_check(self, trial: Trial, path: Path) -> tuple[float, Evaluation]:
        builder, checker = self._start_workers(trial.target.cores)
        try:
            built = builder.call(
                "attntune.measure.builder:build_trial", trial, str(path), timeout_secs=_BUILD_TIMEOUT_SECS
            )
            checked = checker.call(f"{self._evaluator}:check", trial, str(path), timeout_secs=_CHECK_TIMEOUT_SECS)
        finally:
            self._last_build = time.monotonic()
        assert isinstance(built, Built)
        assert isinstance(checked, Evaluation)
        if checked.tainted:
            checker.close()
        return built.secs, checked

    @property
    def _evaluator(self) -> str:
        return f"attntune.measure.{'cuda_' if self._target and self._target.kind == 'cuda' else ''}evaluator"

    # -- the processes that build --------------------------------------------------------------------------------------

    def _start_workers(self, cores: int) -> tuple[IsolatedProcess, IsolatedProcess]:
        if self._workers is None:
            self._workers = (
                self._process(threads=1, preload=[("attntune.measure.builder:warm_up",)]),
                self._process(threads=cores, env=POOL_ENV, preload=[(f"{self._evaluator}:start", cores)]),
            )  # fmt: skip
            self._end_workers_later(_IDLE_SECS)
        for worker in self._workers:
            worker.start()
        return self._workers

    def _end_workers_later(self, secs: float) -> None:
        timer = threading.Timer(secs, self._end_idle_workers)
        timer.daemon = True
        timer.start()

    def _end_idle_workers(self) -> None:
        with self._lock:
            left = self._last_build + _IDLE_SECS - time.monotonic()
            if left > 0:
                self._end_workers_later(left)
            elif self._workers is not None:
                for worker in self._workers:
                    worker.close()
                self._workers = None

    # -- this machine --------------------------------------------------------------------------------------------------

    def _host_target(self) -> Target:
        """:func:`attntune.target.native`, remembered on disk: asking LLVM for the CPU's name imports the compiler."""
        if "tvm" in sys.modules:
            return native()
        place = self.folder / "host.json"
        fingerprint = [
            cpu_model(), host_triple(), *host_features(), physical_cores(), len(available_cpus()), *package_versions(),
        ]  # fmt: skip
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttntuneError):
            known = json.loads(place.read_text())
            if known["fingerprint"] == fingerprint:
                return Target.from_json(known["target"])
        builder, _ = self._start_workers(physical_cores())
        self._last_build = time.monotonic()
        target = builder.call("attntune.target:native", timeout_secs=_BUILD_TIMEOUT_SECS)
        assert isinstance(target, Target)
        with contextlib.suppress(OSError):
            scratch = place.with_name(f"host.{os.getpid()}.tmp")
            scratch.write_text(json.dumps({"fingerprint": fingerprint, "target": target.to_json()}))
            scratch.replace(place)
        return target


@functools.cache
def package_versions() -> tuple[str, str]:
    """Versions of attntune and TVM."""
    from attntune import __version__

    return __version__, importlib.metadata.version("apache-tvm")


@functools.cache
def sources_digest() -> str:
    """Digest of the code that kernels are made by: a checkout may change without its version changing."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for folder in ("ops", "templates"):
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
