"""Text from a compiled model: greedy, sampled or by beam search, whole or token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from attntune.errors import InputError
from attntune.runtime.beam import beam_search
from attntune.runtime.sampling import Sampler, Sampling, Suppressed
from attntune.runtime.sequences import Sequences

if TYPE_CHECKING:
    from attntune.runtime.prompt_cache import PromptCache


@dataclass
class Generated:
    """What was written for each prompt, and how long it took."""

    tokens: list[list[int]]
    """New token ids by prompt, without the stop token."""
    scores: list[float] = field(default_factory=list)
    """With beam search, of each sequence."""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Of the prompt, those whose keys and values a kept cache held already."""
    prefill_secs: float = 0.0
    """From the call to the first token: encoder and prompt."""
    decode_secs: float = 0.0
    decode_steps: int = 0

    @property
    def new_tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.tokens))

    def add(self, other: Generated) -> None:
        """What was written for further prompts, one lot after the other."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def generate(
    tuned: Any, prompts: Sequence[Sequence[int]], *, source: Mapping[str, np.ndarray] | None = None,
    max_new_tokens: int = 128, sampling: Sampling | None = None, beams: int | None = None,
    length_penalty: float | None = None, stop: Sequence[int] | None = None, cache: PromptCache | None = None,
) -> Generated:  # fmt: skip
    """Write on from ``prompts``.

    Args:
        tuned: a loaded artifact of a model that writes one token after another.
        prompts: token ids by row; rows may differ in length.
        source: of an encoder-decoder, the inputs of its entry ``encode``, NumPy, as many rows as prompts.
        max_new_tokens: at most so many for each prompt.
        sampling: how tokens are drawn; greedy by default.
        beams: more than 1: beam search with so many, of as many prompts at a time as the artifact has room for. By
            default as many as the model's authors decode by, but 1 with a temperature or a cache, or where the artifact
            has no room for them.
        length_penalty: of beam search: scores are divided by length to this power; by default the model's.
        stop: token ids that end a sequence; by default the model's.
        cache: what earlier calls read and wrote, for a single prompt: the beginning that it shares with them is not
            read again. It holds this prompt and what is written after it then.

    Raises:
        InputError: the model does not generate, an option is out of range, or prompts and new tokens are longer than
            the compiled cache or the model allows; before anything is run.
    """
    if beams is None:
        drawn = sampling is not None and sampling.temperature > 0
        beams = 1 if drawn or cache is not None else usual_beams(tuned)
    if beams > 1:
        if cache is not None:
            raise InputError(f"expected either beams or the cache of an earlier call, got {beams} beams and a cache")
        return _by_beams(tuned, prompts, source, max_new_tokens, beams, length_penalty, stop, sampling)
    found = Generated([[] for _ in prompts], prompt_tokens=sum(map(len, prompts)))
    for row, token in stream(
        tuned, prompts, source=source, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, timings=found,
        cache=cache,
    ):  # fmt: skip
        found.tokens[row].append(token)
    return found


def usual_beams(tuned: Any) -> int:
    """Of the beam search that the model's authors decode by, where the artifact has room for so many rows; else 1."""
    beams = int((tuned.manifest.get("generation") or {}).get("beams", 1))
    return beams if beams <= most_rows(tuned) else 1


def most_rows(tuned: Any) -> int:
    """Of all sequences that an artifact writes at once."""
    buckets = (bucket["dims"] for bucket in tuned.manifest["buckets"] if bucket["entry"] == "decode")
    return max((int(dims.get("batch", 1)) for dims in buckets), default=1)


def stream(
    tuned: Any, prompts: Sequence[Sequence[int]], *, source: Mapping[str, np.ndarray] | None = None,
    max_new_tokens: int = 128, sampling: Sampling | None = None, stop: Sequence[int] | None = None,
    timings: Generated | None = None, cache: PromptCache | None = None,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Pairs of row and new token as they are written, never by beams; see :func:`generate`. Errors come at once."""
    ends, suppressed = _settings(tuned, prompts, max_new_tokens, stop)
    timings = timings or Generated([])
    start = time.perf_counter()
    sequences = Sequences(tuned, prompts, source, max_new_tokens, cache)
    timings.prefill_secs = time.perf_counter() - start
    return _stream(sequences, Sampler(sampling or Sampling(), len(prompts)), max_new_tokens, ends, suppressed, timings)


def _stream(
    sequences: Sequences, sampler: Sampler, longest: int, ends: frozenset[int], suppressed: Suppressed,
    timings: Generated,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    start = time.perf_counter()
    logits = sequences.begin()
    timings.prefill_secs += time.perf_counter() - start
    timings.reused_tokens = max(sequences.reused - sequences.start_tokens, 0)
    going = np.ones(sequences.rows, bool)
    for step in range(longest):
        if never := suppressed.at(step):
            logits = np.array(logits)
            logits[:, never] = -np.inf
        tokens = sampler(logits)
        going &= ~np.isin(tokens, list(ends))
        for row in np.flatnonzero(going):
            yield int(row), int(tokens[row])
        if not going.any() or step + 1 == longest:
            return
        start = time.perf_counter()
        logits = sequences.step(tokens)
        timings.decode_secs += time.perf_counter() - start
        timings.decode_steps += 1


def _by_beams(
    tuned: Any, prompts: Sequence[Sequence[int]], source: Mapping[str, np.ndarray] | None, longest: int, beams: int,
    length_penalty: float | None, stop: Sequence[int] | None, sampling: Sampling | None,
) -> Generated:  # fmt: skip
    if sampling is not None and sampling.temperature > 0:
        raise InputError("expected either beams or a temperature, got both")
    ends, suppressed = _settings(tuned, prompts, longest, stop)
    together = max(1, most_rows(tuned) // beams)
    if len(prompts) > together:
        whole = Generated([])
        for first in range(0, len(prompts), together):
            some = slice(first, first + together)
            sources = {name: values[some] for name, values in (source or {}).items()}
            whole.add(_by_beams(tuned, prompts[some], sources, longest, beams, length_penalty, stop, sampling))
        return whole
    start = time.perf_counter()
    repeated = [prompt for prompt in prompts for _ in range(beams)]
    sources = {name: np.repeat(values, beams, axis=0) for name, values in (source or {}).items()}
    sequences = Sequences(tuned, repeated, sources, longest)
    own = tuned.manifest["generation"]
    renormalize = bool(own.get("renormalize"))
    if length_penalty is None:
        length_penalty = float(own.get("length_penalty", 1.0))
    found = beam_search(sequences, beams, longest, ends, suppressed, length_penalty, renormalize)
    best = [options[0] for options in found]
    return Generated(
        [[token for token in tokens if token not in ends] for _, tokens in best], [score for score, _ in best],
        prompt_tokens=sum(map(len, prompts)), decode_secs=time.perf_counter() - start,
        decode_steps=max(len(tokens) for _, tokens in best),
    )  # fmt: skip


def _settings(
    tuned: Any, prompts: Sequence[Sequence[int]], longest: int, stop: Sequence[int] | None
) -> tuple[frozenset[int], Suppressed]:
    generation = tuned.manifest.get("generation")
    if not generation:
        raise InputError(f"{tuned.manifest['name']} does not write text; its entries are {sorted(tuned.entries)}")
    if missing := [name for name in ("decode",) if name not in tuned.entries]:
        raise InputError(f"{tuned.manifest['name']} was compiled without the entries {missing} that generation needs")
    if not prompts:
        raise InputError("expected at least one prompt")
    if longest < 1:
        raise InputError(f"expected max_new_tokens of at least 1, got {longest}")
    # Artifacts of before have no such list.
    suppressed = Suppressed(tuple(generation["suppress"]), tuple(generation.get("suppress_first", ())))
    return frozenset(generation["stop"] if stop is None else stop), suppressed
