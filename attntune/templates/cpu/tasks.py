"""Tasks of a kernel shared between cores: each has its own part, and takes from the others' when that is done.

TVM divides a parallel loop evenly, once. Where a core is slower for a while (a neighbour on a shared host, another
process, an efficiency core), the others then wait for it. On two virtual cores of a shared host, each of which was seen
at 118 or at 160 GFLOP/s from one moment to the next, linear layers take 1 to 5 % less time this way. Beginning with its
own part keeps a core at the rows or columns that its cache holds from the kernel before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_PRAGMA = "pragma_import_llvm"
#: Between two cores' counters, in elements, so that they share no cache line, nor one that is prefetched with it.
_GAP = 32

_LLVM_IR = """
define linkonce_odr i32 @attntune_take(ptr %counter) alwaysinline {
  %taken = atomicrmw add ptr %counter, i32 1 monotonic
  ret i32 %taken
}
"""


def share_out(tasks: int, cores: int, body: Callable[[Any], None], imports: Mapping[str, str] | None = None) -> None:
    """In the root block of a kernel being written: ``body(task)`` for every task, on ``cores`` cores.

    Args:
        tasks: how many.
        cores: threads of the kernel's pool.
        body: writes one task; the index is an int32 expression.
        imports: annotation with the LLVM IR that ``body`` calls, see :mod:`attntune.templates.cpu.bf16`.
    """
    from tvm import tirx
    from tvm.tirx.script.builder import ir as T

    def one(task: Any) -> None:
        with T.sblock("task"):
            T.reads()
            T.writes()
            body(task)

    imports = dict(imports or {})
    if tasks <= cores or cores == 1:
        with T.parallel(tasks, annotations=imports) as task:
            one(task)
        return
    imports[_PRAGMA] = imports.get(_PRAGMA, "") + _LLVM_IR
    counters = T.sblock_alloc_buffer((cores * _GAP,), "int32")
    for core in range(cores):
        T.buffer_store(counters, tirx.const(core * tasks // cores, "int32"), [core * _GAP])
    with T.parallel(cores, annotations=imports) as core, T.sblock("core"):
        T.reads()
        T.writes()
        taken = T.sblock_alloc_buffer((1,), "int32", scope="local")

        def take(whose: Any) -> None:
            counter = tirx.address_of(counters[whose * _GAP])
            T.buffer_store(taken, tirx.call_extern("int32", "attntune_take", counter), [0])

        with T.serial(cores) as offset:
            whose = T.bind((core + offset) % cores)
            end = T.bind((whose + 1) * tasks // cores)
            take(whose)
            with T.While(taken[0] < end):
                one(taken[0])
                take(whose)
