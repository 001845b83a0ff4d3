"""Copies of tiles of tensors between device and shared memory (TMA); see :mod:`attntune.templates.cuda.hopper`.

Sources: NVIDIA, "PTX ISA", sections on ``cp.async.bulk.tensor`` and the asynchronous proxy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attntune.templates.cuda.intrinsics import HALVES, HEAD, emit


def prefetch(tensor_map: Any) -> None:
    """Bring a tensor map into the cache."""
    from tvm.tirx.script.builder import ir as T

    line = '  asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");'
    emit("prefetch_map", "unsigned long long map", line, T.address_of(tensor_map))


def copy_tile(to: Any, tensor_map: Any, coordinates: Sequence[Any], barrier: Any) -> None:
    """By one thread: copy a box to the address ``to``; its bytes count at the mbarrier. Zeros past the ends."""
    from tvm.tirx.script.builder import ir as T

    rank = len(coordinates)
    at = ", ".join(f"%{i + 3}" for i in range(rank))
    emit(
        f"copy_tile_{rank}d",
        "unsigned to, unsigned long long map, unsigned barrier, " + ", ".join(f"int c{i}" for i in range(rank)),
        f"""  asm volatile("cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {{{at}}}], [%2];"
               :: "r"(to), "l"(map), "r"(barrier), {", ".join(f'"r"(c{i})' for i in range(rank))} : "memory");""",
        to, T.address_of(tensor_map), barrier, *coordinates,
    )  # fmt: skip


def store_tile(tensor_map: Any, coordinates: Sequence[Any], address: Any) -> None:
    """By one thread, after :func:`written_for_copies` and a barrier: copy a tile to its box; nothing past the ends."""
    from tvm.tirx.script.builder import ir as T

    rank = len(coordinates)
    at = ", ".join(f"%{i + 2}" for i in range(rank))
    emit(
        f"store_tile_{rank}d",
        "unsigned long long map, unsigned from, " + ", ".join(f"int c{i}" for i in range(rank)),
        f"""  asm volatile("cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group [%0, {{{at}}}], [%1];"
               :: "l"(map), "r"(from), {", ".join(f'"r"(c{i})' for i in range(rank))} : "memory");""",
        T.address_of(tensor_map), address, *coordinates,
    )  # fmt: skip


def stores_have_read() -> None:
    """By the thread that stored tiles: wait until shared memory may be written again."""
    emit(
        "stores_have_read", "",
        """  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");""",
    )  # fmt: skip


def store_pair(address: Any, dtype: str, a: Any, b: Any) -> None:
    """Round two float32 values to ``dtype`` and put them side by side to an address of shared memory."""
    from tvm.tirx.script.builder import ir as T

    pair, rounded = {"bfloat16": ("__nv_bfloat162", "__floats2bfloat162_rn"),
                     "float16": ("__half2", "__floats2half2_rn")}[dtype]  # fmt: skip
    source = f"""{HALVES}{HEAD}store_pair_{dtype}(unsigned to, float a, float b) {{
  {pair} pair = {rounded}(a, b);
  unsigned bits = *(unsigned*)&pair;
  asm volatile("st.shared.b32 [%0], %1;" :: "r"(to), "r"(bits) : "memory");
}}
"""
    T.evaluate(T.cuda.func_call(f"attntune_store_pair_{dtype}", address, a, b, source_code=source))


def written_for_copies() -> None:
    """By every thread that wrote to shared memory what :func:`store_tile` is to read."""
    emit("fence_proxy_async", "", '  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");')
