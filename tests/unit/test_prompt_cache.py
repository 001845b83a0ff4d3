"""A key-value cache kept between calls, on the model of NumPy: the same tokens as reading everything again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation import CONTEXT, VOCAB, Toy

from attntune.errors import InputError
from attntune.runtime.generation import Generated, generate, stream
from attntune.runtime.prompt_cache import PromptCache
from attntune.runtime.sequences import Sequences


def prefilled(toy):
    """Tokens that the calls so far read, padding included."""
    return sum(size for entry, size in toy.calls if entry == "prefill")


@pytest.mark.parametrize("saved", [False, True])
def test_only_what_is_new_is_prefilled(saved):
    toy = Toy(1, stop=())
    if saved:
        toy.manifest = json.loads(json.dumps(toy.manifest))
    cache = PromptCache(toy)
    first = generate(toy, [[1, 2, 3, 4, 5]], max_new_tokens=4, cache=cache)
    assert (first.tokens, first.reused_tokens) == ([toy.greedy([1, 2, 3, 4, 5], 4, stop=())], 0)
    # The last token was never put in: nothing came after it.
    assert cache.tokens == [1, 2, 3, 4, 5, *first.tokens[0][:-1]]
    toy.calls.clear()
    prompt = [1, 2, 3, 4, 5, *first.tokens[0], 6, 1]
    second = generate(toy, [prompt], max_new_tokens=5, cache=cache)
    assert second.tokens == [toy.greedy(prompt, 5, stop=())]
    assert (second.prompt_tokens, second.reused_tokens) == (11, 8)
    assert prefilled(toy) == 4
    # The whole prompt is there already: its last token is read again for what follows it.
    toy.calls.clear()
    again = generate(toy, [prompt], max_new_tokens=5, cache=cache)
    assert (again.tokens, again.reused_tokens, prefilled(toy)) == (second.tokens, 10, 2)


def test_logits_equal_those_of_everything_read_again():
    toy = Toy(2)
    cache = PromptCache(toy)
    generate(toy, [[1, 2, 3, 4, 5, 6]], max_new_tokens=6, cache=cache)
    # Parts with it in the middle.
    prompt = [1, 2, 3, 1, 1]
    sequences = Sequences(toy, [prompt], None, 4, cache)
    logits = [sequences.begin()]
    assert sequences.reused == 3
    for token in (2, 5, 6):
        logits.append(sequences.step(np.array([token])))
    whole = [*prompt, 2, 5, 6]
    expected = np.array([toy.logits(whole[: len(prompt) + step]) for step in range(4)], np.float32)
    assert np.array_equal(np.concatenate(logits), expected)
    assert cache.tokens == whole


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3),
    st.sampled_from([(1,), (2, 4), (3, 16), (CONTEXT,)]),
    st.lists(st.tuples(st.integers(0, CONTEXT), st.lists(st.integers(1, VOCAB - 1), max_size=12), st.integers(1, 8)),
             min_size=1, max_size=6),
)  # fmt: skip
def test_any_prompts_one_after_another(seed, chunks, turns):
    toy = Toy(seed, chunks=chunks)
    cache = PromptCache(toy)
    before: list[int] = []
    for kept, new, most in turns:
        prompt = ([*before[:kept], *new] or [1])[: CONTEXT - most]
        found = generate(toy, [prompt], max_new_tokens=most, cache=cache)
        assert found.tokens == [toy.greedy(prompt, most)]
        before = [*prompt, *found.tokens[0]]
        assert cache.tokens == before[: len(cache.tokens)]
        assert np.array_equal(cache.state["key_cache.0"][0, : len(cache.tokens), 0], cache.tokens)


def test_an_interrupted_call_leaves_a_cache_that_is_true():
    class Interrupted(Toy):
        left = 3

        def run(self, entry, **inputs):
            found = super().run(entry, **inputs)  # the kernel ends, what waits for it does not
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return found

    for left in range(1, 7):
        toy = Interrupted(3, stop=())
        cache = PromptCache(toy)
        toy.left = 100
        generate(toy, [[1, 2, 3, 4, 5, 6, 1]], max_new_tokens=3, cache=cache)
        toy.left = left
        prompt = [1, 2, 3, 6, 6, 5, 5, 4, 4]
        with pytest.raises(KeyboardInterrupt):
            generate(toy, [prompt], max_new_tokens=6, cache=cache)
        toy.left = 100
        assert generate(toy, [prompt], max_new_tokens=6, cache=cache).tokens == [toy.greedy(prompt, 6, stop=())]


def test_a_stream_that_is_not_read_to_its_end():
    toy = Toy(4, stop=())
    cache = PromptCache(toy)
    timings = Generated([])
    tokens = stream(toy, [[1, 2]], max_new_tokens=9, cache=cache, timings=timings)
    assert cache.tokens == []
    written = [next(tokens)[1] for _ in range(3)]
    tokens.close()
    assert cache.tokens == [1, 2, *written[:2]]
    prompt = [1, 2, *written, 3]
    found = generate(toy, [prompt], max_new_tokens=2, cache=cache)
    assert (found.tokens, found.reused_tokens) == ([toy.greedy(prompt, 2, stop=())], 4)


def test_start_tokens_are_not_the_prompts():
    toy = Toy(1, stop=())
    toy.manifest["generation"]["start"] = [6, 6]
    cache = PromptCache(toy)
    first = generate(toy, [[1]], max_new_tokens=2, cache=cache)
    assert cache.tokens == [6, 6, 1, first.tokens[0][0]]
    other = generate(toy, [[2]], max_new_tokens=2, cache=cache)
    assert (other.reused_tokens, other.tokens) == (0, [toy.greedy([6, 6, 2], 2, stop=())])
    assert generate(toy, [[2, 3]], max_new_tokens=2, cache=cache).reused_tokens == 1


def test_errors_come_before_anything_is_run_and_nothing_is_lost():
    toy = Toy(1, stop=())
    cache = PromptCache(toy)
    generate(toy, [[1, 2, 3]], max_new_tokens=3, cache=cache)
    held, calls = list(cache.tokens), len(toy.calls)
    for prompts, options, message in (
        ([[1, 2] * 10], {"max_new_tokens": 5}, r"within 24, got 20 \+ 5"),
        ([[1], [2]], {}, "expected one prompt and toy with the cache of an earlier call; got 2"),
        ([[1]], {"beams": 2}, "either beams or the cache"),
        ([[1]], {"source": {"input_ids": np.ones((1, 1))}, "max_new_tokens": 1}, "has no encoder"),
    ):
        with pytest.raises(InputError, match=message):
            generate(toy, prompts, cache=cache, **options)
    with pytest.raises(InputError, match="a cache of another model"):
        generate(Toy(1), [[1]], cache=cache)
    assert (cache.tokens, len(toy.calls)) == (held, calls)


@pytest.mark.parametrize("lacks", ["prefill", "generation", "positions", "encoder"])
def test_models_without_such_a_cache_are_refused(lacks):
    toy = Toy()
    entries = toy.manifest["entries"]
    if lacks == "prefill":
        del entries["prefill"]
    elif lacks == "generation":
        toy.manifest["generation"] = None
    elif lacks == "positions":
        entries["decode"]["inputs"][-1] = {**entries["decode"]["inputs"][-1], "dims": ["batch", "hidden"]}
    else:
        entries["encode"] = {"inputs": [], "outputs": [], "updates": {}}
    with pytest.raises(
        InputError, match="expected a decoder with a key-value cache and the entries prefill and decode"
    ):
        PromptCache(toy)
