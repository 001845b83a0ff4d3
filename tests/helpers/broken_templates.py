"""A tiny operator and templates for it that go wrong in every way a schedule can."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attntune.ops.workload import TensorSpec, Workload
from attntune.search.space import Config, ConfigSpace, Knob
from attntune.templates.template import Packing, ScheduleTemplate

BUILD_MODES = (
    "raise",
    "build_segfault",
    "build_hang",
    "build_native_hang",
    "build_memory",
    "build_abort",
    "not_a_module",
)
RUN_MODES = ("wrong", "nan", "unwritten", "outside", "input", "segfault", "abort", "exit", "hang", "memory")
MODES = ("ok", "slow", *BUILD_MODES, *RUN_MODES)


@dataclass(frozen=True)
class Double(Workload):
    """y = 2 · (x + shift), shift being a constant."""

    op: ClassVar[str] = "double"

    n: int = 1024

    def inputs(self) -> tuple[TensorSpec, ...]:
        return TensorSpec("x", (self.n,), "float32"), TensorSpec("shift", (self.n,), "float32", constant=True)

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("y", (self.n,), "float32"),)

    def compute(self) -> list[Any]:
        raise NotImplementedError

    def reference(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        x, shift = (np.asarray(value, np.float64) for value in inputs)
        return (2 * (x + shift),)

    def flops(self) -> int:
        return 2 * self.n

    @classmethod
    def from_call(cls, attrs: Any, args: Any) -> Double:
        return cls(args[0].shape[0])


class Broken(ScheduleTemplate):
    """Does what the knob ``mode`` says; ``ok`` and ``slow`` are right. The constant is packed negated and reversed."""

    op: ClassVar[str] = "double"
    kind: ClassVar[str] = "cpu"

    def space(self, workload: Workload, target: Any) -> ConfigSpace:
        return ConfigSpace([Knob("mode", MODES)])

    def default(self, workload: Workload, target: Any) -> Config:
        return Config.of(mode="ok")

    def pack(self, workload: Workload, target: Any) -> dict[str, Packing]:
        spec = workload.inputs()[1]
        return {"shift": Packing(spec, lambda values: -values[::-1])}

    def schedule(self, workload: Workload, target: Any, config: Config) -> Any:
        mode = config["mode"]
        if mode in BUILD_MODES:
            return break_build(str(mode))
        import tvm

        assert isinstance(workload, Double)
        return tvm.IRModule({"main": kernel(workload.n, str(mode)).with_attr("global_symbol", "main")})


def break_build(mode: str) -> Any:
    print(f"about to {mode}", flush=True)
    if mode == "raise":
        raise ValueError("this schedule cannot be made")
    if mode == "build_segfault":
        ctypes.string_at(8)
    if mode == "build_hang":
        time.sleep(1000)
    if mode == "build_native_hang":
        hang_in_native_code()
    if mode == "build_memory":
        return bytearray(1 << 45)
    if mode == "build_abort":
        os.abort()
    return mode


def kernel(n: int, mode: str) -> Any:
    """The kernel, with what ``mode`` does to it."""
    from tvm.script import tirx as T

    offset = {"wrong": 1e-3, "nan": float("nan")}.get(mode, 0.0)
    written = n // 2 if mode == "unwritten" else n
    repeats = 2000 if mode == "slow" else 1

    @T.prim_func(s_tir=True)
    def main(a: T.handle, b: T.handle, c: T.handle) -> None:
        x = T.match_buffer(a, (n,), "float32")
        shift = T.match_buffer(b, (n,), "float32")
        y = T.match_buffer(c, (n,), "float32")
        with T.sblock("root"):
            T.reads(x[0:n], shift[0:n])
            T.writes(x[0:n], y[0:n])
            for _ in T.serial(repeats):
                for i in T.parallel(written):
                    y[i] = T.float32(2) * (x[i] - shift[n - 1 - i]) + T.float32(offset)
            if mode == "outside":
                y[n + 2] = T.float32(7)
            if mode == "input":
                x[3] = T.float32(7)
            if mode == "segfault":
                T.evaluate(T.call_extern("int32", "raise", 11))
            if mode == "abort":
                T.evaluate(T.call_extern("void", "abort"))
            if mode == "exit":
                T.evaluate(T.call_extern("void", "_exit", 3))
            if mode == "hang":
                T.evaluate(T.call_extern("int32", "sleep", 1000))
            if mode == "memory":
                z = T.sblock_alloc_buffer((1 << 42,), "float32")
                for i in T.serial(1 << 42):
                    z[i] = x[0]
                y[0] = z[T.cast(x[0], "int32")]

    return main


def hang_in_native_code() -> None:
    """Never returns, and holds the interpreter's lock."""
    ctypes.PyDLL(None).sleep(1000)


def echo(*values: Any) -> Any:
    return values


def process_id() -> int:
    return os.getpid()


def environment(name: str) -> str | None:
    return os.environ.get(name)


def unpicklable() -> Any:
    return lambda: None


def raise_attntune_error() -> None:
    from attntune.errors import ScheduleError

    raise ScheduleError("as itself")


def raise_strange_error() -> None:
    class StrangeError(Exception):
        pass

    raise StrangeError("cannot be pickled")


def print_and_exit(code: int) -> None:
    print("last words", flush=True)
    os._exit(code)


def allocate(size: int) -> int:
    return len(bytearray(size))


def sleep(secs: float) -> str:
    time.sleep(secs)
    return "slept"


def imported(name: str) -> bool:
    import sys

    return name in sys.modules
