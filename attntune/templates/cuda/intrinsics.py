"""Tensor-core and asynchronous-copy instructions as device functions that kernels in TIR call.

TVM's own intrinsics multiply float16 and int8 only; these are ours, for bfloat16 too. Each function is one instruction
of PTX (NVIDIA, "Parallel Thread Execution ISA", sections 9.7.9 and 9.7.14), except for the stores of pairs.

Shared memory is passed as a buffer and an offset in elements of 16 bits, which TVM does not look into: it would put
barriers of its own between copies and reads, whose order the kernels see to themselves.

Fragments of ``mma.m16n8k16``, by lane, with g = lane / 4 and t = lane % 4, each register holding two values of 16 bits:

    a   (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)    rows and columns of the 16 × 16 operand
    b   (2t, g), (2t + 8, g)                                  of the 16 × 8 operand
    d   (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)    of the 16 × 8 result, float32
"""

from __future__ import annotations

from typing import Any

from attntune.templates.cuda.launch import dynamic_shared

#: Groups of copies that may be in flight at most.
MAX_PENDING = 4

#: How a device function of ours begins, up to its name.
HEAD = "__forceinline__ __device__ void attntune_"


def _ldmatrix(name: str, modifier: str) -> str:
    return f"""{HEAD}{name}(unsigned* r, const void* shared, int at) {{
  asm volatile("ldmatrix.sync.aligned.m8n8.x4{modifier}.shared.b16 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((unsigned)__cvta_generic_to_shared((const short*)shared + at))
               : "memory");
}}
"""


def _mma(name: str, ptx_dtype: str) -> str:
    return f"""{HEAD}{name}(float* d, const unsigned* a, const unsigned* b) {{
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.{ptx_dtype}.{ptx_dtype}.f32 "
               "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}}
"""


def _wait(pending: int) -> str:
    return f"""{HEAD}cp_async_wait_{pending}() {{
  asm volatile("cp.async.wait_group {pending};" ::: "memory");
}}
"""


#: Functions whose bodies are assembly, by name.
SOURCES: dict[str, str] = {
    "ldmatrix_x4": _ldmatrix("ldmatrix_x4", ""),
    "ldmatrix_x4_trans": _ldmatrix("ldmatrix_x4_trans", ".trans"),
    "mma_bfloat16": _mma("mma_bfloat16", "bf16"),
    "mma_float16": _mma("mma_float16", "f16"),
    # 16 bytes from global to shared memory, past the first-level cache; zeros where not valid.
    "cp_async_16": f"""{HEAD}cp_async_16(void* shared, int at, const void* from, bool valid) {{
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :: "r"((unsigned)__cvta_generic_to_shared((short*)shared + at)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}}
""",
    "cp_async_commit": f"""{HEAD}cp_async_commit() {{ asm volatile("cp.async.commit_group;" ::: "memory"); }}
""",
    **{f"cp_async_wait_{n}": _wait(n) for n in range(MAX_PENDING + 1)},
}

#: For functions of pairs: TVM includes only the headers of types that it sees.
HALVES = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
"""

#: Functions in plain CUDA C++.
_PLAIN: dict[str, str] = {
    "store_2_bfloat16": f"""{HALVES}{HEAD}store_2_bfloat16(void* to, float a, float b) {{
  *(__nv_bfloat162*)to = __floats2bfloat162_rn(a, b);
}}
""",
    "store_2_float16": f"""{HALVES}{HEAD}store_2_float16(void* to, float a, float b) {{
  *(__half2*)to = __floats2half2_rn(a, b);
}}
""",
    "pack_2_bfloat16": f"""{HALVES}{HEAD}pack_2_bfloat16(unsigned* to, float a, float b) {{
  __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  *to = *(unsigned*)&pair;
}}
""",
    "pack_2_float16": f"""{HALVES}{HEAD}pack_2_float16(unsigned* to, float a, float b) {{
  __half2 pair = __floats2half2_rn(a, b);
  *to = *(unsigned*)&pair;
}}
""",
    "store_2_float32": f"""{HEAD}store_2_float32(void* to, float a, float b) {{ *(float2*)to = make_float2(a, b); }}
""",
}


def call(name: str, *arguments: Any) -> None:
    """Emit a call of the device function ``name`` where a kernel is being built."""
    from tvm.tirx.script.builder import ir as T

    source = SOURCES.get(name) or _PLAIN[name]
    T.evaluate(T.cuda.func_call(f"attntune_{name}", *arguments, source_code=source))


def emit(name: str, parameters: str, lines: str, *arguments: Any) -> None:
    """Emit a call of a device function of this name, parameters and body."""
    from tvm.tirx.script.builder import ir as T

    source = f"{HEAD}{name}({parameters}) {{\n{lines}\n}}\n"
    T.evaluate(T.cuda.func_call(f"attntune_{name}", *arguments, source_code=source))


def opaque(value: Any) -> Any:
    """The same integer, which the compiler takes for any: it does not unroll a loop of so many turns to its end."""
    from tvm.tirx.script.builder import ir as T

    source = """__forceinline__ __device__ int attntune_opaque(int n) {
  asm volatile("" : "+r"(n));
  return n;
}
"""
    return T.bind(T.cuda.func_call("attntune_opaque", value, source_code=source, return_type="int32"))


class SharedFloats:
    """``count`` float32 values in a block's dynamic shared memory.

    TVM does not look into them, either: it would put barriers between accesses that it cannot tell apart, and refuses a
    kernel where one of them is under a condition.
    """

    def __init__(self, count: int) -> None:
        self._buffer = dynamic_shared(count, "float32")

    def load(self, at: Any) -> Any:
        """The value at index ``at``, bound where it is loaded."""
        from tvm.tirx.script.builder import ir as T

        source = """__forceinline__ __device__ float attntune_shared_load(const void* shared, int at) {
  return ((const float*)shared)[at];
}
"""
        loaded = T.cuda.func_call(
            "attntune_shared_load", self._buffer.data, at, source_code=source, return_type="float32"
        )
        return T.bind(loaded)

    def store(self, at: Any, value: Any) -> None:
        """Put ``value`` at index ``at``."""
        from tvm.tirx.script.builder import ir as T

        source = f"""{HEAD}shared_store(void* shared, int at, float value) {{ ((float*)shared)[at] = value; }}
"""
        T.evaluate(T.cuda.func_call("attntune_shared_store", self._buffer.data, at, value, source_code=source))
