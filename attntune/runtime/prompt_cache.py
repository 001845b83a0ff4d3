"""The key-value cache of one sequence, kept between calls of ``generate``: only what is new in a prompt is prefilled.

Keys and values of a causal model depend on their own and earlier tokens alone, so those of a prefix stay true whatever
follows. Which tokens the arrays hold is known here; what lies behind them (padding, an earlier continuation, half of a
call that was interrupted) is never seen, as no query looks ahead, and overwritten by what comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attntune.errors import InputError
from attntune.runtime.sequences import capacity


class PromptCache:
    """Keys and values of one sequence's tokens, by one model. One call of ``generate`` at a time may use it.

    Args:
        tuned: a :class:`TunedModel` that writes, without an encoder, with its entries ``prefill`` and ``decode``.
        context: tokens that it holds at least; by default those of the largest compiled shape.

    Raises:
        InputError: the model keeps no such cache, or no compiled shape is as large as ``context``.
    """

    def __init__(self, tuned: Any, context: int | None = None) -> None:
        entries = tuned.manifest["entries"]
        decode = entries.get("decode", {"inputs": (), "updates": {}})
        kept = [spec for spec in decode["inputs"] if spec["name"] in decode["updates"]]
        by_position = kept and all("context" in spec["dims"] for spec in kept)
        if not tuned.manifest.get("generation") or "encode" in entries or "prefill" not in entries or not by_position:
            raise InputError(
                f"expected a decoder with a key-value cache and the entries prefill and decode, to keep the cache of; "
                f"got {tuned.manifest['name']} with {sorted(entries)}"
            )
        self.tuned = tuned
        self.state: dict[str, np.ndarray] = tuned.state("decode", 1, context=context or capacity(tuned))
        """Arrays by name, each with axes of batch and context, of a compiled shape; the sequence is row 0."""
        self.context: int = self.state[kept[0]["name"]].shape[kept[0]["dims"].index("context")]
        """Tokens that it holds at most."""
        self.tokens: list[int] = []
        """Whose keys and values it holds, from position 0."""

    def common(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt need not be read again.

        The longest common prefix, less one where that is the whole prompt: what follows is known by its last token.
        """
        most = min(len(self.tokens), len(prompt) - 1)
        return next((at for at in range(most) if self.tokens[at] != prompt[at]), most)

    def truncate(self, length: int) -> None:
        """Forget the tokens from position ``length`` on, as before they are overwritten."""
        del self.tokens[length:]
