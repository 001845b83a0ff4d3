"""Tasks shared between cores, and what stays on the stack: kernels written for the purpose."""

import dataclasses

import numpy as np
import pytest

from attntune.measure.buffers import GuardedArray, as_tensor
from attntune.ops.attention import Attention
from attntune.ops.linear import Linear
from attntune.target import PRESETS, Target, native
from attntune.templates import template_for
from attntune.templates.cpu.attention_bf16_kernel import AttentionBf16Kernel, AttentionWidenedKernel
from attntune.templates.cpu.linear import LinearCPU
from attntune.templates.cpu.tasks import share_out
from attntune.templates.lowering import build

TARGET = native().with_cores(2)


def counting_kernel(tasks, cores, slow):
    """Adds one to ``done[task]``; task ``slow`` first does a long sum, so that its core falls behind."""
    import tvm
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        done = T.arg("done", T.buffer((tasks,), "int32"))
        work = T.arg("work", T.buffer((1,), "float32"))

        def body(task):
            with T.If(task == slow), T.Then(), T.serial(3_000_000) as i:
                T.buffer_store(work, work[0] * tirx.const(0.5, "float32") + tirx.Cast("float32", i), [0])
            T.buffer_store(done, done[task] + 1, [task])

        with T.sblock("root"):
            share_out(tasks, cores, body)
    return build(tvm.IRModule({"main": builder.get()}), TARGET)["main"]


@pytest.mark.parametrize(("tasks", "cores"), [(1, 2), (2, 2), (3, 2), (7, 2), (64, 2), (5, 4), (33, 3), (9, 1)])
def test_every_task_is_done_once_at_each_call(tasks, cores):
    kernel = counting_kernel(tasks, cores, slow=0)
    done, work = GuardedArray.holding(np.zeros(tasks, np.int32)), GuardedArray.holding(np.zeros(1, np.float32))
    for call in range(1, 6):
        kernel(as_tensor(done.array), as_tensor(work.array))
        assert done.array.tolist() == [call] * tasks
    assert done.guards_intact()


def llvm_of(workload, target, **knobs):
    template = template_for(workload, target)
    config = template.default(workload, target).replace(**knobs)
    return build(template.schedule(workload, target, config), target).mod.inspect_source("ll")


def test_a_tile_of_sums_is_no_buffer_of_the_pool():
    """Taken from the pool, it would be written out at every step of a loop that prefetches."""
    text = llvm_of(Linear(64, 96, 96), PRESETS["x86-64-v4"], prefetch=16)
    assert "llvm.prefetch" in text
    assert "call ptr @TVMBackendAllocWorkspace" not in text
    assert "load ptr, ptr @__TVMBackendAllocWorkspace" not in text


class TestBfloat16AsFloat32:
    """Where multiply-adds of float32 outrun products of pairs, operands are widened; both are right anywhere."""

    WITH_AMX = Target.parse('{"kind": "llvm", "mcpu": "emeraldrapids", "num-cores": 2}')
    EMERALD = dataclasses.replace(WITH_AMX, features=tuple(f for f in WITH_AMX.features if f[:3] != "amx"))

    def test_the_default_follows_what_the_cpu_starts_in_a_cycle(self):
        layer, attention = Linear(128, 96, 96, dtype="bfloat16"), Attention(1, 2, 64, 64, 32, dtype="bfloat16")
        for workload in (layer, attention):
            template = template_for(workload, self.EMERALD)
            assert template.default(workload, self.EMERALD)["widen"] is True
            assert template.default(workload, PRESETS["znver4"])["widen"] is False

    def test_few_rows_are_bound_by_memory_and_stay_pairs(self):
        one = Linear(1, 96, 96, dtype="bfloat16")
        assert LinearCPU().default(one, self.EMERALD)["widen"] is False

    def test_which_instruction_multiplies(self):
        layer = Linear(128, 96, 96, dtype="bfloat16")
        pairs, widened = (llvm_of(layer, PRESETS["znver4"], widen=widen, prefetch=0) for widen in (False, True))
        calls = [
            [line for line in text.splitlines() if "call" in line and "dpbf16ps" in line] for text in (pairs, widened)
        ]
        assert calls[0]
        assert not calls[1]

    def test_kernels_by_their_names(self):
        workload = Attention(1, 2, 40, 40, 16, dtype="bfloat16")
        config = template_for(workload, PRESETS["znver4"]).default(workload, PRESETS["znver4"])
        kernels = (AttentionBf16Kernel, AttentionWidenedKernel)
        assert len({str(kernel(workload, PRESETS["znver4"], config).function()) for kernel in kernels}) == 2
