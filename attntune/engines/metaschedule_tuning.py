"""TVM's own MetaSchedule on a model's workloads: the search, which runs until it is killed, and what it found.

The workloads are the tensor expressions that attntune's templates schedule, weights as they come. Every measured
schedule goes into MetaSchedule's JSON database at once, so what was found before the end is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attntune.engines.graph import ModelGraph
from attntune.models.model import bind

if TYPE_CHECKING:
    from attntune.ops import Workload
    from attntune.target import Target

#: Trials of one task before the next has its turn. MetaSchedule's own 64 would spend a minute on the first task alone.
_TRIALS_PER_TURN = 8
_MAX_TRIALS = 10_000


def workloads_of(graph: ModelGraph, entry: str, dims: Mapping[str, int]) -> dict[Workload, int]:
    """The distinct workloads of one run, those with the most work first, and how many of its calls each is."""
    constants = frozenset(graph.weights)
    counts = Counter(call.workload(dims, constants) for call in graph.calls(entry))
    # MetaSchedule takes its first turns in this order: with little time, it must go where it counts.
    return dict(sorted(counts.items(), key=lambda pair: -pair[0].flops() * pair[1]))


def module_of(workload: Workload) -> Any:
    """The workload's tensor expression as an ``IRModule`` with one function, ``main``, not yet scheduled."""
    import tvm
    from tvm import te

    # MetaSchedule would count the operations itself, and fails at the first bound intermediate value (prim.Let).
    attributes = {"global_symbol": "main", "estimated_flops": workload.flops()}
    return tvm.IRModule({"main": te.create_prim_func(workload.compute()).with_attrs(attributes)})


def open_database(folder: str | Path) -> Any:
    """MetaSchedule's JSON database in ``folder``."""
    from tvm.s_tir import meta_schedule

    return meta_schedule.database.JSONDatabase(work_dir=str(folder))


def warm_up() -> None:
    """Import what the search would import first, which takes 12 s: part of starting a process, not of tuning."""
    import tvm.s_tir.meta_schedule
    import tvm.s_tir.tensor_intrin  # noqa: F401


def build_candidate(module: Any, target: Any, _params: Any) -> Any:
    """One candidate as machine code, in MetaSchedule's worker process.

    MetaSchedule's own ``default_build``, less its import of every tensor intrinsic: its workers start anew for each
    batch, and that import (12 to 33 s on 2 cores) let every candidate exceed the builder's 30 s.
    """
    import tvm
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

    with tvm.transform.PassContext():
        return tvm.compile(RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module), target=target)


def tune(graph_folder: str, entry: str, dims: Mapping[str, int], target_fields: Mapping[str, Any], folder: str) -> int:
    """Tune until killed, or until the trials run out; measured schedules are in the database of ``folder``.

    Returns:
        How many tasks there were.
    """
    from tvm.s_tir import meta_schedule

    from attntune.target import Target

    target = Target.from_json(target_fields)
    workloads = workloads_of(ModelGraph.load(graph_folder), entry, dims)
    tvm_target = target.to_tvm()
    contexts = [
        meta_schedule.TuneContext(
            mod=module_of(workload),
            target=tvm_target,
            space_generator="post-order-apply",
            search_strategy="evolutionary",
            task_name=f"{workload.op}_{number}",
            rand_state=number + 1,
            num_threads=target.cores,
        )
        for number, workload in enumerate(workloads)
    ]
    meta_schedule.tune.tune_tasks(
        tasks=[context.clone() for context in contexts],
        task_weights=[float(count) for count in workloads.values()],
        work_dir=folder,
        max_trials_global=_MAX_TRIALS,
        num_trials_per_iter=_TRIALS_PER_TURN,
        builder=meta_schedule.builder.LocalBuilder(max_workers=target.cores, f_build=build_candidate),
        runner=meta_schedule.runner.LocalRunner(),
        database=open_database(folder),
        cost_model="xgb",
    )
    return len(contexts)


def best_kernels(folder: str, workloads: Iterable[Workload], target: Target) -> tuple[dict[Workload, Any], int]:
    """The fastest schedule measured of each workload that has one, as a TVM function, and how many were measured."""
    database = open_database(folder)
    kernels = {}
    for workload in workloads:
        if (module := database.query_ir_module(module_of(workload), target.to_tvm(), "main")) is not None:
            kernels[workload] = module["main"]
    return kernels, len(database)


def compile_model(
    graph: ModelGraph, entry: str, dims: Mapping[str, int], kernels: Mapping[Workload, Any], target: Target
) -> Callable[..., Any]:
    """One entry at one shape, built of the given kernels; takes and returns TVM tensors, weights bound."""
    import tvm
    from tvm import relax

    from attntune.templates import lowering

    builder = relax.BlockBuilder()
    variables = {
        workload: builder.add_func(function.without_attr("global_symbol"), f"kernel_{number}")
        for number, (workload, function) in enumerate(kernels.items())
    }
    constants = frozenset(graph.weights)
    signature, calls = graph.entries[entry], graph.calls(entry)
    used = dict.fromkeys(arg for call in calls for arg in call.args if arg in constants)
    values = {
        spec.name: relax.Var(spec.name, relax.TensorType(bind(spec.dims, dims), spec.dtype))
        for spec in signature.inputs
    }
    for number, name in enumerate(used):
        weight = graph.weights[name]
        values[name] = relax.Var(f"weight_{number}", relax.TensorType(weight.shape, weight.dtype.name))

    def shaped(value: Any, shape: tuple[int, ...]) -> Any:
        same = tuple(int(dim) for dim in value.ty.shape) == tuple(shape)
        return value if same else builder.emit(relax.op.reshape(value, shape))

    with builder.function("main", list(values.values())):
        with builder.dataflow():
            for call in calls:
                workload = call.workload(dims, constants)
                operands = [shaped(values[a], s.shape) for a, s in zip(call.args, workload.inputs(), strict=True)]
                (out,) = workload.outputs()
                result = relax.call_tir(variables[workload], operands, relax.TensorType(out.shape, out.dtype))
                values[call.result] = builder.emit(result)
            finals = [shaped(values[spec.name], bind(spec.dims, dims)) for spec in signature.outputs]
            output = builder.emit_output(finals[0] if len(finals) == 1 else relax.Tuple(finals))
        builder.emit_func_output(output)
    machine = relax.VirtualMachine(lowering.build(builder.get(), target), tvm.cpu())
    weights = [tvm.runtime.tensor(np.ascontiguousarray(graph.weights[name])) for name in used]
    function = machine["main"]
    return lambda *inputs: function(*inputs, *weights)
