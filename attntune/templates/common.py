"""Scheduling moves and questions that several templates share; moves are described as before → after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attntune.ops.reduction import Element, Reduction

#: A loop so marked is split by the compiler into a main part and a tail: the bounds check leaves the main part.
PARTITION_HINT = "pragma_loop_partition_hint"


@dataclass(frozen=True)
class LaneStage:
    """A stage of a lane-wise reduction: its name, and the loops it has after the outer ones."""

    name: str
    lanes: int
    """Extent of the innermost spatial loop; 1 for a stage of scalars without that loop."""
    accumulates: bool = False
    """Whether it is the accumulating stage, with loops (vectors, lanes, steps)."""


class LaneReduction(Reduction):
    """Reduces in ``vectors`` independent registers of ``lanes`` elements, then folds them by halves.

    ::

        s = Σ_k e(k)
        →
        part[v, l] = Σ_step e(step · vectors · lanes + v · lanes + l)          multiply-adds on vectors registers
        fold[l]    = Σ_v part[v, l] + whole vectors that are left              lanes wide
        half[l]    = fold[l] + fold[l + lanes/2] + e(tail + l)                 lanes/2 wide; again for lanes/4, … 1

    A tail of ``extent % lanes`` elements is a sum of distinct powers of two, each of which joins the halving step of
    its width: any extent costs at most log2(lanes) narrow operations more than a multiple of ``lanes``, and no
    element is reached under a condition.

    Args:
        lanes: elements of a register, a power of two; halved until it is at most the extent.
        vectors: accumulators, which hide the latency of the addition; fewer where the extent has not as many vectors.
    """

    def __init__(self, lanes: int, vectors: int) -> None:
        self.lanes = lanes
        self.vectors = vectors
        self.stages: dict[str, list[LaneStage]] = {}
        """By the name of the reduction, in the order they are computed."""

    def sum(self, name: str, lead: Sequence[int], extent: int, element: Element) -> Any:
        """Stage ``name`` of shape ``lead`` and those that lead to it, in :attr:`stages`."""
        from tvm import te

        return self._reduce(name, tuple(lead), extent, element, te.sum, lambda a, b: a + b)

    def max(self, name: str, lead: Sequence[int], extent: int, element: Element) -> Any:
        """Stage ``name`` of shape ``lead`` and those that lead to it, in :attr:`stages`."""
        from tvm import te

        return self._reduce(name, tuple(lead), extent, element, te.max, te.max)

    def _reduce(
        self, name: str, lead: tuple[int, ...], extent: int, element: Element, reducer: Any, combine: Any
    ) -> Any:
        from tvm import te

        lanes = lanes_within(self.lanes, extent)
        whole = extent // lanes
        vectors = min(self.vectors, whole)
        steps, left = divmod(whole, vectors)
        rank = len(lead)
        step = te.reduce_axis((0, steps), name="step")
        part = te.compute(
            (*lead, vectors, lanes),
            lambda *at: reducer(
                element(at[:rank], step * (vectors * lanes) + at[rank] * lanes + at[rank + 1]), axis=step
            ),
            name=f"{name}_part",
        )
        stages = self.stages.setdefault(name, [LaneStage(f"{name}_part", lanes, accumulates=True)])

        def fold(*at: Any) -> Any:
            i, lane = (at, 0) if lanes == 1 else (at[:-1], at[-1])
            terms = [part[(*i, v, lane)] for v in range(vectors)]
            terms += [element(i, (whole - left + v) * lanes + lane) for v in range(left)]
            return balanced(terms, combine)

        stages.append(LaneStage(name if lanes == 1 else f"{name}_fold", lanes))
        folded = te.compute(lead if lanes == 1 else (*lead, lanes), fold, name=stages[-1].name)
        at, width = whole * lanes, lanes // 2
        while width:
            final = width == 1
            takes_tail = bool((extent - at) & width)

            half = _half(folded, width, combine, element if takes_tail else None, at)
            stages.append(LaneStage(name if final else f"{name}_half{width}", width))
            folded = te.compute(lead if final else (*lead, width), half, name=stages[-1].name)
            at += width if takes_tail else 0
            width //= 2
        return folded


def _half(wide: Any, width: int, combine: Any, element: Element | None, start: int) -> Any:
    """``wide``'s two halves combined, and with them ``width`` elements of the tail from ``start`` on."""

    def half(*at: Any) -> Any:
        i, lane = (at, 0) if width == 1 else (at[:-1], at[-1])
        value = combine(wide[(*i, lane)], wide[(*i, lane + width)])
        return value if element is None else combine(value, element(i, start + lane))

    return half


def lanes_within(lanes: int, extent: int) -> int:
    """The largest power of two that is at most ``lanes`` and ``extent``."""
    return 1 << (min(lanes, extent).bit_length() - 1)


def powers_of_two_below(lanes: int) -> list[int]:
    """``lanes/2, lanes/4, … 1``."""
    return [1 << bit for bit in reversed(range(lanes.bit_length() - 1))]


def balanced(terms: Sequence[Any], combine: Any) -> Any:
    """Combine ``terms`` pairwise, as a tree: the dependency chain is log2 long."""
    terms = list(terms)
    while len(terms) > 1:
        paired = [combine(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = paired + terms[len(paired) * 2 :]
    return terms[0]


def fuse_outer(sch: Any, block: Any, count: int) -> Any:
    """``for i: for j: …`` → ``for ij: …`` over the first ``count`` loops of ``block``; returns the loop."""
    loops = sch.get_loops(block)[:count]
    return sch.fuse(*loops) if len(loops) > 1 else loops[0]


def vectorize_inner(sch: Any, block: Any, lanes: int) -> None:
    """Vectorise the innermost loop of ``block``, whatever its extent; ``block`` itself cannot be moved afterwards.

    ::

        for j in range(n): b
        →
        for j_outer in range(n // lanes): for lane vectorised: b
        for j in the next lanes/2, where n has them, vectorised: b      … lanes/4, … down to 1

    The tail is split into distinct powers of two, so that no element is reached under a condition. (The compiler's own
    loop partition would leave the tail scalar, and is misled by other conditions in ``b``, such as a causal mask's.)
    """
    loop = sch.get_loops(block)[-1]
    extent = int(sch.get(loop).extent)
    lanes = lanes_within(lanes, extent)
    main = extent // lanes * lanes
    sizes = [main, *(width for width in powers_of_two_below(lanes) if (extent - main) & width)]
    loops = sch.loop_partition(loop, [*sizes[:-1], None]) if len(sizes) > 1 else [loop]
    for part, size in zip(loops, sizes, strict=True):
        if size > lanes:
            sch.vectorize(sch.split(part, [None, lanes])[1])
        elif size > 1:
            sch.vectorize(part)


def compute_reduction_at(sch: Any, stages: Sequence[LaneStage], loop: Any) -> None:
    """Move every stage of one lane-wise reduction under ``loop``, accumulators in registers, lanes as vectors.

    ::

        for i: part …    for i: fold …    for i: half …    for i: … loop body
        →
        for i (loop): part …; fold …; half …; loop body
    """
    for stage in reversed(stages):
        sch.compute_at(sch.get_sblock(stage.name), loop, preserve_unit_loops=True)
    for stage in stages:
        vectorize_stage(sch, stage)


def vectorize_stage(sch: Any, stage: LaneStage) -> None:
    """Vectorise one stage of a lane-wise reduction, in place; any ``parallel`` must already be set.

    ::

        for v: for l: for step: part          →   for v, l: part = identity
                                                  for step: for v unrolled: for l vectorised: part
        for l: fold or half                   →   for l vectorised: fold or half
    """
    block = sch.get_sblock(stage.name)
    if not stage.accumulates:
        if stage.lanes > 1:
            sch.vectorize(sch.get_loops(block)[-1])
        return
    vector, lane, step = sch.get_loops(block)[-3:]
    sch.reorder(step, vector, lane)
    sch.vectorize(lane)
    sch.unroll(vector)
    init = sch.decompose_reduction(block, step)
    vector, lane = sch.get_loops(init)[-2:]
    sch.vectorize(lane)
    sch.unroll(vector)


def stages_of(sch: Any) -> list[Any]:
    """The blocks of a function, in order; none where one stage holds all of its loops."""
    if sch.mod["main"].body.block.name_hint != "root":  # one stage that holds all of its loops, as a recurrence is
        return []
    return list(sch.get_child_blocks(sch.get_sblock("root")))


def reductions_of(sch: Any, block: Any) -> list[Any]:
    """Reduction axes of ``block``."""
    return [axis for axis in sch.get(block).iter_vars if axis.iter_type == axis.CommReduce]


def only_read_elementwise(sch: Any, block: Any) -> bool:
    """Whether inlining ``block`` repeats no work: it is read, and only by stages without reductions."""
    consumers = sch.get_consumers(block)
    return bool(consumers) and all(not reductions_of(sch, consumer) for consumer in consumers)


def reduces_contiguously(sch: Any, block: Any) -> bool:
    """Whether the last reduction axis is the contiguous one of every operand that it indexes."""
    from tvm import tirx

    axis = reductions_of(sch, block)[-1].var

    def uses(bounds: Any) -> bool:
        return any(axis.same_as(variable) for variable in tirx.analysis.undefined_vars(bounds.min))

    regions = [list(read.region) for read in sch.get(block).reads]
    indexed = [region for region in regions if any(uses(bounds) for bounds in region)]
    return all(uses(region[-1]) and not any(uses(bounds) for bounds in region[:-1]) for region in indexed)
