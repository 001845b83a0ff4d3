"""The one way kernels become machine code, in tuning and in compiled artifacts alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attntune.target import Target

#: Loops that a template marks with ``pragma_loop_partition_hint`` are split into a main part and a tail, so that the
#: bounds check of a tile that does not divide its dimension stays out of the main part.
PASS_CONFIG = {"s_tir.LoopPartition": {"partition_const_loop": True}}


def build(module: Any, target: Target) -> Any:
    """Compile an ``IRModule`` of scheduled kernels (or a Relax module) for ``target``; returns a TVM executable.

    Raises:
        ToolchainError: when the target needs a compiler that is missing.
        CompileError: for CUDA, when a kernel spills registers or asks for more than the target has.
    """
    return build_with_resources(module, target)[0]


def build_with_resources(module: Any, target: Target, *, code: str = "cubin") -> tuple[Any, dict[str, Any]]:
    """As :func:`build`; and for CUDA what each kernel takes of an SM, by name (empty for CPUs).

    Args:
        module: see :func:`build`.
        target: see :func:`build`.
        code: for CUDA, what the executable carries: ``"cubin"``; ``"ptx"``, which the driver assembles as it is loaded,
            also for newer GPUs; or ``"source"``, which takes nvcc to load.
    """
    import tvm

    tvm_target = target.to_tvm()
    if target.kind != "cuda":
        from attntune.templates import cpu_lowering

        cpu_lowering.register()
        with tvm_target, tvm.transform.PassContext(opt_level=3, config=PASS_CONFIG):
            compiled = tvm.compile(
                module, target=tvm_target, relax_pipeline=_relax_pipeline(), tir_pipeline=cpu_lowering.PIPELINE
            )
        return compiled, {}
    from attntune.templates import cuda_lowering
    from attntune.templates.nvcc import as_json

    with cuda_lowering.building(target, code=code) as cuda:
        context = tvm.transform.PassContext(opt_level=3, instruments=[cuda_lowering.launch_watcher(cuda)])
        with tvm_target, context:
            executable = tvm.compile(module, target=tvm_target, relax_pipeline=_relax_pipeline())
        cuda_lowering.finish(cuda, executable.mod)
    cuda.require_runnable()
    return executable, as_json(cuda.kernels(), target)


def _relax_pipeline() -> Any:
    """Relax to VM calls. Kernels are scheduled already, so nothing is legalised or fused."""
    import tvm
    from tvm.relax import transform

    return tvm.transform.Sequential(
        [
            transform.RewriteDataflowReshape(),
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            tvm.transform.module_pass(_without_parameter_checks, opt_level=0),
            transform.AttachGlobalSymbol(),
        ]
    )


def _without_parameter_checks(module: Any, _context: Any) -> Any:
    """Drop the checks of each parameter's type and shape that every call of a VM function begins with.

    Shapes are static here, the runtime checks a caller's inputs itself, and weights do not change: two checks for each
    of a model's weights are 1 % of a short call.
    """
    from tvm import relax

    checks = {"vm.builtin.check_tensor_info", "vm.builtin.match_shape"}

    def is_check(binding: Any) -> bool:
        callee = getattr(binding.value, "op", None)
        return isinstance(callee, relax.ExternFunc) and str(callee.global_symbol) in checks

    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            blocks = [
                relax.BindingBlock([binding for binding in block.bindings if not is_check(binding)])
                for block in function.body.blocks
            ]
            body = relax.SeqExpr(blocks, function.body.body)
            module[name] = relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)
    return module


def export(module: Any, target: Target, path: Path, *, code: str = "cubin") -> dict[str, Any]:
    """Compile ``module`` and write it as a shared library with a function ``main(*inputs, *outputs)``.

    Returns what its kernels take of an SM (see :func:`build_with_resources`, also for ``code``).
    """
    executable, resources = build_with_resources(module, target, code=code)
    executable.export_library(str(path))
    return resources
