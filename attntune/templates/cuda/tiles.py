"""Tiles of 16-bit elements in shared memory, laid out so that neither copies nor ldmatrix meet bank conflicts."""

from __future__ import annotations

from typing import Any

#: Elements of 16 bits in the 16 bytes that cp.async copies and ldmatrix reads of one row.
CHUNK = 8
#: Chunks that lie side by side in the 32 banks.
_BANK_CHUNKS = 8


def swizzled(row: Any, chunk: Any, chunks: int) -> Any:
    """Offset, in elements, of ``chunk`` of ``row`` in a tile of ``chunks`` chunks a row.

    The same chunk of eight consecutive rows, which ldmatrix reads at once, lies in eight different groups of banks:
    the chunk is exclusive-or'ed with the row (where a row is shorter than all banks, with the row of that length).

    Args:
        row: integer expression.
        chunk: integer expression or number, less than ``chunks``.
        chunks: a power of two.
    """
    rows_side_by_side = max(1, _BANK_CHUNKS // chunks)
    turned = chunk ^ (row // rows_side_by_side % min(chunks, _BANK_CHUNKS))
    return (row * chunks + turned) * CHUNK
