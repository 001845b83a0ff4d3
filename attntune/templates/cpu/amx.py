"""AMX on CPUs: products of whole tiles of bfloat16 by ``tdpbf16ps``, with float32 sums.

A core has eight tile registers of 16 rows of 64 bytes. One instruction multiplies a tile of x (16 rows × 32 values)
with one of a weight's panel (16 pairs × 16 columns, as ``arithmetic.Bfloat16`` packs it) into a tile of sums (16 × 16).
TVM knows none of this, so every operation is a function of LLVM IR that names its registers, imported by a
``pragma_import_llvm`` and called as an extern (see :mod:`attntune.templates.cpu.bf16`).

Linux lets a process use tiles only after it has asked. A kernel asks by itself, once for each library, so that whatever
loads it needs to know nothing; :func:`attntune.host.host_features` names AMX only where asking is granted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from attntune.host import ASK_FOR_TILES
from attntune.target import Target
from attntune.templates.cpu import bf16

ROWS = 16
"""Rows of a tile."""
PAIRS = 16
"""Pairs of bfloat16 in a row of a tile, and reduction steps of pairs in one instruction."""
_ROW_BYTES = 64
_REGISTERS = 8

_LLVM_IR = """
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8, i8, i8)

@attntune_amx_allowed = linkonce_odr hidden global i32 0

define linkonce_odr i32 @attntune_amx_end() alwaysinline {
  call void @llvm.x86.tilerelease()
  ret i32 0
}
"""

_BEGIN = """
@attntune_amx_shapes_NAME = linkonce_odr hidden constant [64 x i8] [SHAPES], align 64

define linkonce_odr i32 @attntune_amx_begin_NAME() alwaysinline {
entry:
  %known = load atomic i32, ptr @attntune_amx_allowed monotonic, align 4
  %first = icmp eq i32 %known, 0
  br i1 %first, label %ask, label %go
ask:
  %granted = call i64 asm sideeffect "syscall",
    "={rax},{rax},{rdi},{rsi},~{rcx},~{r11},~{memory},~{dirflag},~{fpsr},~{flags}"(i64 ASK0, i64 ASK1, i64 ASK2)
  store atomic i32 1, ptr @attntune_amx_allowed monotonic, align 4
  br label %go
go:
  call void @llvm.x86.ldtilecfg(ptr @attntune_amx_shapes_NAME)
  ret i32 0
}
"""
for _place, _word in enumerate(ASK_FOR_TILES):
    _BEGIN = _BEGIN.replace(f"ASK{_place}", str(_word))

_ZERO = """
define linkonce_odr i32 @attntune_amx_zero_T() alwaysinline {
  call void @llvm.x86.tilezero(i8 T)
  ret i32 0
}
"""

_MOVE = """
define linkonce_odr i32 @attntune_amx_HOW_T(ptr %at, i64 %stride) alwaysinline {
  call void @llvm.x86.INSTRUCTION(i8 T, ptr %at, i64 %stride)
  ret i32 0
}
"""

_DOT = """
define linkonce_odr i32 @attntune_amx_dot_C_A_B() alwaysinline {
  call void @llvm.x86.tdpbf16ps(i8 C, i8 A, i8 B)
  ret i32 0
}
"""


def available(target: Target) -> bool:
    """Whether ``target`` multiplies tiles of bfloat16."""
    return bf16.available(target) and target.has("amx-tile", "amx-bf16")


def fits(rows: int, panels: int) -> bool:
    """Whether the sums of so many rows × panels have registers, and what is multiplied as well."""
    across = math.ceil(rows / ROWS)
    return across * panels + across + 1 <= _REGISTERS


@dataclass(frozen=True)
class Tiles:
    """How a block of ``rows`` × ``panels`` lies in the registers: sums, then x, then the panels in turns.

    Tiles of x take turns instead where they are too many; then all must be whole.

    With ``totals`` the last two are a tile of ones and what it adds up: of ``panels``, one row of ones to the left of
    them and one row of sums; of ``rows``, one column of ones to the right of x and one column of sums.
    """

    rows: int
    panels: int
    totals: str = ""

    @property
    def heights(self) -> list[int]:
        """Rows of each tile of x."""
        whole, left = divmod(self.rows, ROWS)
        return [ROWS] * whole + [left] * bool(left)

    def sums(self, i: int, v: int) -> int:
        """The register of the sums of the ``i``-th tile of x with panel ``v``."""
        return i * self.panels + v

    @property
    def _lefts(self) -> int:
        """Registers of tiles of x: one for each, or, where that leaves none for panels, what those leave."""
        free = self._free
        return len(self.heights) if len(self.heights) < free else free - self.panels

    @property
    def _free(self) -> int:
        """Registers of what is multiplied."""
        return _REGISTERS - 2 * bool(self.totals) - len(self.heights) * self.panels

    def left(self, i: int) -> int:
        """The register of the ``i``-th tile of x."""
        return len(self.heights) * self.panels + i % self._lefts

    def right(self, v: int) -> int:
        """The register of panel ``v``'s tile."""
        return len(self.heights) * self.panels + self._lefts + v % (self._free - self._lefts)

    @property
    def ones(self) -> int:
        """The register of the ones of ``totals``."""
        return _REGISTERS - 1

    @property
    def total(self) -> int:
        """The register of the sums of ``totals``."""
        return _REGISTERS - 2

    # -- instructions, in a kernel being written -----------------------------------------------------------------------

    def begin(self) -> None:
        """Tell the processor the tiles' shapes; what they held is lost."""
        _call(f"begin_{self.name}")

    def zero(self) -> None:
        """All sums 0."""
        for i in range(len(self.heights)):
            for v in range(self.panels):
                _call(f"zero_{self.sums(i, v)}")

    def load(self, register: int, at: Any, stride: Any) -> None:
        """A tile from memory: ``at`` its first element, as an index of a buffer; ``stride`` bytes between rows."""
        _move("load", register, at, stride)

    def store(self, register: int, at: Any, stride: Any) -> None:
        """A tile to memory, as :meth:`load`."""
        _move("store", register, at, stride)

    def dot(self, i: int, v: int) -> None:
        """Add the product of the ``i``-th tile of x and panel ``v``'s tile to their sums."""
        _call(f"dot_{self.sums(i, v)}_{self.left(i)}_{self.right(v)}")

    def add_up(self, at: int) -> None:
        """Add what is in register ``at``, a panel's tile or one of x as ``totals`` says, to their sums."""
        left, right = (self.ones, at) if self.totals == "panels" else (at, self.ones)
        _call(f"dot_{self.total}_{left}_{right}")

    # -- what kernels import -------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Of these shapes, distinct."""
        return f"{self.rows}x{self.panels}{self.totals}"

    @property
    def products(self) -> set[tuple[int, int, int]]:
        """Registers that are multiplied: sums, left, right."""
        each = {
            (self.sums(i, v), self.left(i), self.right(v)) for i in range(len(self.heights)) for v in range(self.panels)
        }
        if self.totals == "panels":
            return each | {(self.total, self.ones, self.right(v)) for v in range(self.panels)}
        if self.totals == "rows":
            return each | {(self.total, self.left(i), self.ones) for i in range(len(self.heights))}
        return each

    def shapes(self) -> list[int]:
        """The bytes that describe all registers: palette, then bytes of a row (16 bits each), then rows."""
        rows = [ROWS] * _REGISTERS
        for i, height in enumerate(self.heights):
            rows[self.left(i)] = height
            for v in range(self.panels):
                rows[self.sums(i, v)] = height
        row_bytes = [_ROW_BYTES] * _REGISTERS
        for register in (self.ones, self.total):
            if self.totals == "panels":
                rows[register] = 1
            elif self.totals == "rows":
                row_bytes[register] = 4
        widths = [byte for wide in row_bytes for byte in (wide, 0)]
        return [1, *[0] * 15, *widths, *[0] * 16, *rows, *[0] * 8]


def end() -> None:
    """In a kernel being written: give the tiles back, so that the system need not keep them."""
    _call("end")


def llvm_ir(blocks: Iterable[Tiles]) -> str:
    """What kernels with these blocks of tiles import."""
    code = [_LLVM_IR]
    distinct = sorted(set(blocks), key=lambda tiles: tiles.name)
    for tiles in distinct:
        shapes = ", ".join(f"i8 {byte}" for byte in tiles.shapes())
        code.append(_BEGIN.replace("NAME", tiles.name).replace("SHAPES", shapes))
    multiplied = set().union(*(tiles.products for tiles in distinct))
    moved = {register for registers in multiplied for register in registers}
    for register in sorted(moved):
        code.append(_ZERO.replace("_T(", f"_{register}(").replace("i8 T", f"i8 {register}"))
        for how, instruction in (("load", "tileloadd64"), ("store", "tilestored64")):
            text = _MOVE.replace("HOW", how).replace("INSTRUCTION", instruction)
            code.append(text.replace("_T(", f"_{register}(").replace("i8 T", f"i8 {register}"))
    for c, a, b in sorted(multiplied):
        text = _DOT.replace("C_A_B", f"{c}_{a}_{b}")
        code.append(text.replace("i8 C", f"i8 {c}").replace("i8 A", f"i8 {a}").replace("i8 B", f"i8 {b}"))
    return "".join(code)


def _call(name: str, *arguments: Any) -> None:
    from tvm import tirx
    from tvm.tirx.script.builder import ir as T

    T.evaluate(tirx.call_extern("int32", f"attntune_amx_{name}", *arguments))


def _move(how: str, register: int, at: Any, stride: Any) -> None:
    from tvm import tirx

    _call(f"{how}_{register}", tirx.address_of(at), tirx.const(stride, "int64"))
