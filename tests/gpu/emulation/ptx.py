"""Inline assembly of CUDA C++ as calls of the emulated device, one PTX instruction at a time.

What is translated is the text that nvcc would assemble, so that a wrong operand, modifier or order of operands shows.
Instructions are those of the "PTX ISA"; one that is not known here, or not in the form known here, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_ASM = re.compile(r"\basm volatile\s*\(")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


def without_assembly(code: str) -> str:
    """``code`` with each ``asm volatile`` statement as C++."""
    parts, end = [], 0
    while found := _ASM.search(code, end):
        close = _closing(code, found.end())
        parts += [code[end : found.start()], _statement(code[found.end() : close])]
        semicolon = re.compile(r"\)\s*;").match(code, close)
        assert semicolon, f"expected a semicolon after {code[found.start() : close + 1]!r}"
        end = semicolon.end()
    return "".join([*parts, code[end:]])


def _closing(code: str, at: int) -> int:
    """Where the parenthesis that is open at ``at`` closes."""
    depth = 1
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[()]', code[at:]):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if depth == 0:
            return at + token.start()
    raise AssertionError(f"expected a closing parenthesis after {code[at : at + 80]!r}")


def _statement(text: str) -> str:
    """One ``asm volatile``: its template, and what its operands are."""
    sections = _split(text, ":")
    template = "".join(_STRING.findall(sections[0])).replace("\\n", "\n").replace("\\t", " ")
    operands = [operand for section in sections[1:3] for operand in _split(section, ",") if operand.strip()]
    values = []
    for operand in operands:
        found = re.fullmatch(r'\s*"[=+]?[frlh]"\s*\((.*)\)\s*', operand, re.S)
        assert found, f"expected an operand of inline assembly, got {operand!r}"
        values.append(f"({found[1].strip()})")
    lines = [_substituted(line.strip(), values) for line in _without_braces(template).split(";") if line.strip()]
    return "{ " + " ".join(lines) + " }"


def _split(text: str, separator: str) -> list[str]:
    """At separators outside of strings and parentheses; ``::`` is two separators."""
    parts, depth = [""], 0
    for token in re.findall(r'"(?:[^"\\]|\\.)*"|.', text, re.S):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(token, 0)
        if token == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def _without_braces(template: str) -> str:
    """The template without the braces of its scope, if it has one."""
    stripped = template.strip()
    return stripped[1:-1] if stripped.startswith("{") and stripped.endswith("}") else stripped


def _substituted(line: str, values: list[str]) -> str:
    translated = "".join(_instruction(line))
    return re.sub(r"%(\d+)", lambda found: values[int(found[1])], translated)


#: C++ for instructions whose operands are single registers, immediates or addresses.
_SIMPLE = (
    (r"\.reg \.pred (\w+)", r"bool \1 = false;"),
    (r"setp\.ne\.b32 (\w+), (%\d+), 0", r"\1 = \2 != 0;"),
    (r"selp\.u32 (%\d+), 1, 0, (\w+)", r"\1 = \2 ? 1 : 0;"),
    (r"mbarrier\.init\.shared::cta\.b64 \[(%\d+)\], (%\d+)", r"emulated_mbarrier_init(\1, \2);"),
    (r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[(%\d+)\], (%\d+)", r"emulated_mbarrier_arrive(\1, \2);"),
    (r"mbarrier\.arrive\.shared::cta\.b64 _, \[(%\d+)\]", r"emulated_mbarrier_arrive(\1, 0);"),
    (
        r"mbarrier\.try_wait\.parity\.shared::cta\.b64 (\w+), \[(%\d+)\], (%\d+)",
        r"emulated_mbarrier_wait(\2, \3); \1 = true;",
    ),
    (r"fence\.mbarrier_init\.release\.cluster", "emulated_fence_mbarrier_init();"),
    (r"fence\.proxy\.async\.shared::cta", "emulated_fence_proxy();"),
    (r"cp\.async\.bulk\.commit_group", "emulated_bulk_commit();"),
    (r"cp\.async\.bulk\.wait_group\.read (\d+)", r"emulated_bulk_wait(\1);"),
    (r"st\.shared\.b32 \[(%\d+)\], (%\d+)", r"emulated_store_shared(\1, \2);"),
    (r"prefetch\.tensormap \[(%\d+)\]", ""),
    (r"bar\.sync (%\d+), (%\d+)", r"emulated_named_barrier(\1, \2, true);"),
    (r"bar\.arrive (%\d+), (%\d+)", r"emulated_named_barrier(\1, \2, false);"),
    (r"setmaxnreg\.inc\.sync\.aligned\.u32 (\d+)", r"emulated_registers(\1, true);"),
    (r"setmaxnreg\.dec\.sync\.aligned\.u32 (\d+)", r"emulated_registers(\1, false);"),
    (r"wgmma\.fence\.sync\.aligned", "emulated_wgmma_fence();"),
    (r"wgmma\.commit_group\.sync\.aligned", "emulated_wgmma_commit();"),
    (r"wgmma\.wait_group\.sync\.aligned (\d+)", r"emulated_wgmma_wait(\1);"),
)
_COPY = re.compile(
    r"cp\.async\.bulk\.tensor\.(\d)d\.shared::cluster\.global(?:\.tile)?\.mbarrier::complete_tx::bytes "
    r"\[(%\d+)\], \[(%\d+), \{([^{}]*)\}\], \[(%\d+)\]"
)
_STORE = re.compile(
    r"cp\.async\.bulk\.tensor\.(\d)d\.global\.shared::cta(?:\.tile)?\.bulk_group "
    r"\[(%\d+), \{([^{}]*)\}\], \[(%\d+)\]"
)
_WGMMA = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.(bf16|f16) "
    r"\{([^{}]*)\}, (?:\{([^{}]*)\}|(%\d+)), (%\d+), (\w+), (-?1), (-?1)((?:, [01])+)"
)


def _instruction(line: str) -> Iterator[str]:
    """C++ of one instruction, operands still as ``%n``."""
    line = re.sub(r"\s+", " ", line)
    for pattern, replacement in _SIMPLE:
        if found := re.fullmatch(pattern, line):
            yield found.expand(replacement)
            return
    if found := _COPY.fullmatch(line):
        rank, to, tensor_map, coordinates, mbarrier = found.groups()
        assert len(coordinates.split(",")) == int(rank), f"expected {rank} coordinates: {line}"
        yield f"int at[] = {{{coordinates}}}; emulated_tensor_copy({to}, {tensor_map}, {rank}, at, {mbarrier});"
        return
    if found := _STORE.fullmatch(line):
        rank, tensor_map, coordinates, source = found.groups()
        assert len(coordinates.split(",")) == int(rank), f"expected {rank} coordinates: {line}"
        yield f"int at[] = {{{coordinates}}}; emulated_tensor_store({tensor_map}, {rank}, at, {source});"
        return
    found = _WGMMA.fullmatch(line)
    assert found, f"the emulated device knows no instruction {line!r}"
    n, a_type, b_type, sums, registers, a, b, predicate, a_scale, b_scale, transposed = found.groups()
    d, held = ([name.strip() for name in (names or "").split(",") if name] for names in (sums, registers))
    flags = transposed.split(", ")[1:]
    assert a_type == b_type, line
    assert len(d) == int(n) // 2, f"expected {int(n) // 2} sums: {line}"
    assert len(held) in (0, 4), f"expected four registers of A: {line}"
    # A in registers cannot be transposed, and has no flag for it.
    assert len(flags) == (1 if held else 2), line
    fields = (
        n, str(a_type == "bf16").lower(), predicate, str(bool(held)).lower(), "0" if held else flags[0], flags[-1],
        a_scale, b_scale, a or "0", b, *("{" + ", ".join(f"&{name}" for name in names) + "}" for names in (held, d)),
    )  # fmt: skip
    yield f"EmulatedProduct product_of_warp = {{{', '.join(fields)}}}; emulated_wgmma(&product_of_warp);"
