"""CUDA templates that must not get through."""

from attntune.ops import RMSNorm
from attntune.templates.cuda.intrinsics import _PLAIN, call
from attntune.templates.cuda.rows import RMSNormCUDA

#: 300 values that a thread holds at once, more than it has registers.
_HOLD = """__forceinline__ __device__ void attntune_hold(float* x) {
  float v[300];
#pragma unroll
  for (int i = 0; i < 300; ++i) v[i] = ((volatile float*)x)[i];
#pragma unroll
  for (int i = 0; i < 300; ++i) ((volatile float*)x)[i] = v[i] * v[(i + 1) % 300];
}
"""


class Wrong(RMSNormCUDA):
    """Norms with another epsilon."""

    def schedule(self, workload, target, config):
        return super().schedule(RMSNorm(workload.rows, workload.features, eps=workload.eps + 1.0), target, config)


class Spilling(RMSNormCUDA):
    """Needs more registers than there are."""

    def schedule(self, workload, target, config):
        import tvm
        from tvm.script.ir_builder import IRBuilder
        from tvm.tirx.script.builder import ir as T

        _PLAIN["hold"] = _HOLD
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"global_symbol": "main", "tirx.noalias": True})
            buffers = [
                T.arg(spec.name, T.buffer(spec.shape, spec.dtype)) for spec in (*workload.inputs(), *workload.outputs())
            ]
            with (
                T.sblock("root"),
                T.launch_thread("blockIdx.x", 1),
                T.launch_thread("threadIdx.x", 32),
                T.sblock("kernel"),
            ):
                T.reads()
                T.writes()
                call("hold", buffers[-1].access_ptr("rw"))
        return tvm.IRModule({"main": builder.get()})
