"""The one way kernels become machine code, in tuning and in compiled artifacts alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attntune.target import Target

#: Loops that a template marks with ``pragma_loop_partition_hint`` are split into a main part and a tail, so that the
#: bounds check of a tile that does not divide its dimension stays out of the main part.
PASS_CONFIG = {"s_tir.LoopPartition": {"partition_const_loop": True}}


def build(module: Any, target: Target) -> Any:
    """Compile an ``IRModule`` of scheduled kernels (or a Relax module) for ``target``; returns a TVM executable."""
    import tvm

    tvm_target = target.to_tvm()
    with tvm_target, tvm.transform.PassContext(opt_level=3, config=PASS_CONFIG):
        return tvm.compile(module, target=tvm_target, relax_pipeline=_relax_pipeline())


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


def export(module: Any, target: Target, path: Path) -> None:
    """Compile ``module`` and write it as a shared library with a function ``main(*inputs, *outputs)``."""
    build(module, target).export_library(str(path))
