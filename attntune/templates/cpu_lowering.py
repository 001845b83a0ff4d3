"""Lowering of kernels for CPUs: TVM's own passes, and buffers that belong in registers kept on the stack.

TVM takes every buffer inside a kernel from its pool of memory, of one vector or of thousands. The compiler below then
knows only a pointer: what it points to stays in registers as long as nothing in the loop might touch the same memory,
and is written out when the loop ends. A prefetch in the loop was enough to store and load every accumulator at each
step, at half the speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from attntune.target import dtype_bits

PIPELINE = "attntune_cpu"
"""Name of the pipeline, for ``tvm.compile(tir_pipeline=…)`` after :func:`register`."""

#: A buffer with this annotation is left to LLVM as a stack slot.
_ON_STACK = "disable_lower_builtin"
#: Bytes of the smallest and the largest buffer of scope ``local`` that go to the stack; single elements go as well. A
#: tile of sums is more than one vector and less than a register file. A single vector is stored whole to be read by
#: element; where LLVM sees through that, it takes long to simplify a maximum over lanes.
_SMALLEST, _LARGEST = 65, 16 * 1024


def register() -> None:
    """Make :data:`PIPELINE` known to TVM; more than once does nothing more."""
    from tvm import tirx

    tirx.register_tir_pipeline(PIPELINE, _pipeline)


def _pipeline() -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    import tvm
    from tvm import tirx

    lower, finish_host, finish_device = tirx.get_tir_pipeline("s_tir")

    def finish() -> Any:
        on_stack = tirx.transform.prim_func_pass(
            lambda function, _module, _context: function.with_body(_locals_on_stack(function.body)), opt_level=0
        )
        return tvm.ir.transform.Sequential([on_stack, finish_host()])

    return lower, finish, finish_device


def _locals_on_stack(stmt: Any) -> Any:
    """``stmt`` with every small buffer of scope ``local`` marked to stay on the stack."""
    from tvm import tirx

    if isinstance(stmt, tirx.AllocBuffer):
        return tirx.AllocBuffer(stmt.buffer, {_ON_STACK: tirx.const(True, "bool")}) if _fits(stmt.buffer) else stmt
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt([_locals_on_stack(part) for part in stmt.seq])
    if isinstance(stmt, tirx.For):
        return tirx.For(
            stmt.loop_var, stmt.min, stmt.extent, stmt.kind, _locals_on_stack(stmt.body), stmt.thread_binding,
            stmt.annotations, stmt.step,
        )  # fmt: skip
    if isinstance(stmt, tirx.While):
        return tirx.While(stmt.condition, _locals_on_stack(stmt.body))
    if isinstance(stmt, tirx.IfThenElse):
        otherwise = None if stmt.else_case is None else _locals_on_stack(stmt.else_case)
        return tirx.IfThenElse(stmt.condition, _locals_on_stack(stmt.then_case), otherwise)
    if isinstance(stmt, tirx.AttrStmt):
        return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, _locals_on_stack(stmt.body))
    return stmt


def _fits(buffer: Any) -> bool:
    from tvm import tirx

    extents = [int(extent) for extent in buffer.shape if isinstance(extent, tirx.IntImm)]
    if buffer.scope() != "local" or len(extents) < len(buffer.shape):
        return False
    elements = math.prod(extents)
    return elements == 1 or _SMALLEST <= elements * dtype_bits(str(buffer.dtype)) // 8 <= _LARGEST
