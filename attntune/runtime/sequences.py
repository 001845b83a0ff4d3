"""Rows of tokens being written by a compiled model: its entries and the state between them, behind one contract.

A row starts from its prompt, takes one token a step, and may continue as a copy of another row (beam search). What a
model keeps between steps (caches updated in place, hidden states that are replaced, an encoder's output) is no concern
of what chooses the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attntune.errors import InputError
from attntune.runtime.inputs import aligned_zeros

if TYPE_CHECKING:
    from attntune.runtime.prompt_cache import PromptCache


class Sequences:
    """The rows of one call of ``generate``.

    Args:
        tuned: a :class:`TunedModel` with ``generation`` in its manifest.
        prompts: token ids by row, without the model's start tokens; of an encoder-decoder, what its answer begins with.
        source: inputs of the entry ``encode`` by name, as many rows as there are prompts.
        room: tokens that will be written after the prompts at most.
        cache: of an earlier call, to go on with; of a single row.

    Raises:
        InputError: prompts and ``room`` together are longer than the compiled cache or than the model allows, or the
            ``cache`` is of another model.
    """

    def __init__(
        self, tuned: Any, prompts: Sequence[Sequence[int]], source: Mapping[str, np.ndarray] | None, room: int,
        cache: PromptCache | None = None,
    ) -> None:  # fmt: skip
        self._tuned = tuned
        self._entries = tuned.manifest["entries"]
        generation = tuned.manifest["generation"]
        start = list(generation["start"])
        self.start_tokens = len(start)
        self._prompts = [[*start, *map(int, prompt)] for prompt in prompts]
        if not all(self._prompts):
            raise InputError("expected prompts of at least one token")
        self.rows = len(self._prompts)
        self.lengths = np.array([len(prompt) for prompt in self._prompts], np.int64)
        self._cache = cache
        if cache is not None and (self.rows > 1 or cache.tuned is not tuned):
            raise InputError(
                f"expected one prompt and {tuned.manifest['name']} with the cache of an earlier call; got {self.rows} "
                f"and a cache of {'this model' if cache.tuned is tuned else 'another model'}"
            )
        self._check_length(room)
        self.reused = 0
        """Tokens of the prompt that :meth:`begin` found in the cache, start tokens included."""
        self._state: dict[str, Any] = dict(cache.state) if cache is not None else {}
        self._extra: dict[str, np.ndarray] = {}
        if "encode" in self._entries:
            self._encode(source or {})
        elif source:
            raise InputError(f"{tuned.manifest['name']} has no encoder; expected no source, got {sorted(source)}")
        updates = self._entries["decode"]["updates"]
        if any(name not in self._state for name in updates):
            fixed = {dim: size for dim, size in self._sizes().items() if dim != "context"}
            batch = fixed.pop("batch", self.rows)
            room_for = {"context": int(self.lengths.max()) + room} if capacity(tuned) else {}
            made = tuned.state("decode", batch, **fixed, **room_for)
            self._state = {**made, **self._state}

    # -- what is known of the model ------------------------------------------------------------------------------------

    def _check_length(self, room: int) -> None:
        most = limit(self._tuned)
        if self._cache is not None:
            most = min(most, self._cache.context)
        if most and self.lengths.max() + room > most:
            raise InputError(
                f"expected prompt and new tokens within {most}, got {int(self.lengths.max())} + {room}; shorten "
                "the prompt, ask for fewer tokens, or compile with a larger context"
            )

    def _sizes(self) -> dict[str, int]:
        """Sizes that the state so far prescribes."""
        sizes: dict[str, int] = {}
        for spec in self._entries["decode"]["inputs"]:
            if spec["name"] in self._state:
                sizes.update({d: n for d, n in zip(spec["dims"], self._state[spec["name"]].shape, strict=True)
                              if isinstance(d, str)})  # fmt: skip
        return sizes

    # -- running -------------------------------------------------------------------------------------------------------

    def _call(self, entry: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; inputs that the entry does not take are left out, states are replaced."""
        signature = self._entries[entry]
        names = [spec["name"] for spec in signature["inputs"]]
        given = {**self._extra, **self._state, **inputs}
        found = self._tuned.run(entry, **{name: given[name] for name in names if name in given})
        values = found if isinstance(found, tuple) else (found,)
        outputs = dict(zip((spec["name"] for spec in signature["outputs"]), values, strict=True))
        for name, following in signature["updates"].items():
            if following in outputs:
                self._state[name] = outputs.pop(following)
        return outputs

    def _encode(self, source: Mapping[str, np.ndarray]) -> None:
        for name, values in source.items():
            if len(values) != self.rows:
                raise InputError(f"expected {self.rows} rows of {name}, one for each prompt, got {len(values)}")
        self._extra = dict(source)
        carried = {spec["name"] for spec in self._entries["encode"]["outputs"] if spec.get("carried")}
        outputs = self._call("encode", source)
        self._state.update({name: outputs[name] for name in carried})
        # The decoder's own tokens go by the same name.
        self._extra.pop("input_ids", None)

    def begin(self) -> np.ndarray:
        """Read the prompts; logits (rows, vocab) of the tokens that follow them."""
        if "prefill" not in self._entries:
            return self._begin_by_steps()
        longest = int(self.lengths.max())
        logits: np.ndarray | None = None
        cache = self._cache
        done = self.reused = cache.common(self._prompts[0]) if cache is not None else 0
        while done < longest:
            start, size = self._chunk(done, longest - done)
            ids = np.zeros((self.rows, size), np.int64)
            for row, prompt in enumerate(self._prompts):
                part = prompt[start : start + size]
                ids[row, : len(part)] = part
            last = self.lengths - 1 - start
            inputs: dict[str, np.ndarray] = {
                "input_ids": ids,
                "lengths": np.full(self.rows, start + size, np.int32),
                "last": np.clip(last, 0, size - 1),
            }
            if cache is not None:
                cache.truncate(start)
            found = self._call("prefill", inputs)["logits"]
            if cache is not None:
                cache.tokens += self._prompts[0][start : start + size]
            logits = np.array(found) if logits is None else logits
            here = (last >= 0) & (last < size)
            logits[here] = found[here]
            done = start + size
        assert logits is not None
        return logits

    def _chunk(self, done: int, left: int) -> tuple[int, int]:
        """Where the next part of the prompts starts and the compiled length it is padded to.

        A part that would pass the cache's end starts earlier: what was read before is read again, to the same effect.
        """
        fixed = self._sizes()
        lengths = sorted({
            row["dims"]["seq"] for row in self._tuned.manifest["buckets"]
            if row["entry"] == "prefill" and all(row["dims"].get(dim, size) == size for dim, size in fixed.items())
            and row["dims"]["seq"] <= fixed["context"]
        })  # fmt: skip
        if not lengths:
            raise InputError(f"expected a compiled shape of the entry prefill with {fixed}; compile one")
        size = next((length for length in lengths if length >= left), lengths[-1])
        return min(done, fixed["context"] - size), size

    def _begin_by_steps(self) -> np.ndarray:
        """Prompts of equal length, one token after another."""
        if len(set(self.lengths.tolist())) > 1:
            raise InputError("expected prompts of equal length for a model without the entry prefill")
        logits = np.empty(0)
        for tokens in zip(*self._prompts, strict=True):
            logits = self._call("decode", {"input_ids": np.array(tokens, np.int64)[:, None]})["logits"]
        return logits

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token to each row, tokens (rows,); logits (rows, vocab) of what follows."""
        self.lengths = self.lengths + 1
        outputs = self._call(
            "decode", {"input_ids": tokens.astype(np.int64)[:, None], "lengths": self.lengths.astype(np.int32)}
        )
        self.outputs = outputs
        if self._cache is not None:
            self._cache.tokens += tokens.tolist()
        return outputs["logits"]

    def reorder(self, parents: np.ndarray) -> None:
        """Let each row continue as a copy of row ``parents[row]``."""
        if (parents == np.arange(self.rows)).all():
            return
        written = int(self.lengths.max())
        for spec in self._entries["decode"]["inputs"]:
            name = spec["name"]
            if name not in self._entries["decode"]["updates"]:
                continue
            array = self._state[name]
            if not isinstance(array, np.ndarray):
                self._tuned.permute(array, parents)
            elif "context" in spec["dims"]:
                rows = array[: self.rows].swapaxes(1, spec["dims"].index("context"))
                rows[:, :written] = rows[parents, :written]
            else:
                moved = aligned_zeros(array.shape, array.dtype)
                moved[: self.rows] = array[parents]
                self._state[name] = moved
        self.lengths = self.lengths[parents]


def capacity(tuned: Any) -> int:
    """Keys that the largest compiled cache holds; 0 without one."""
    buckets = [row["dims"] for row in tuned.manifest["buckets"] if row["entry"] == "decode"]
    return max((dims.get("context", 0) for dims in buckets), default=0)


def limit(tuned: Any) -> int:
    """Tokens that a sequence may have, start tokens and prompt included; 0: any number."""
    limits = (capacity(tuned), tuned.manifest["generation"]["max_length"])
    return min((most for most in limits if most), default=0)
