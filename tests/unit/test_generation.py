"""Generation over a model of NumPy that keeps its state as compiled ones do, and has no compiler."""

from __future__ import annotations

import dataclasses
import itertools
import json
from unittest import mock

import numpy as np
import pytest

from attntune.errors import InputError
from attntune.runtime.generation import generate, stream
from attntune.runtime.sampling import Sampler, Sampling, candidates, log_softmax

VOCAB, CONTEXT, STOP = 7, 24, 0


class Toy:
    """A decoder whose next-token scores depend on every token before, through a cache of what was written."""

    def __init__(self, seed=0, chunks=(2, 4), stop=(STOP,), batches=(1, 4, 8), suppress=(), suppress_first=()):
        rng = np.random.default_rng(seed)
        self.table, self.place = rng.normal(size=(VOCAB, VOCAB)) * 2, rng.normal(size=(CONTEXT, VOCAB))
        # Tuples as in an artifact fresh from the compiler; one that was saved has lists.
        caches = {"name": "key_cache.0", "dims": ("batch", "context", 1), "dtype": "float32", "carried": True}
        self.entries = ("prefill", "decode")
        self.calls = []
        self.manifest = {
            "name": "toy",
            "generation": {"kind": "decoder", "start": [], "stop": list(stop), "max_length": 0,
                           "suppress": list(suppress), "suppress_first": list(suppress_first)},
            "entries": {
                "prefill": {
                    "inputs": [{"name": n, "dims": d} for n, d in (("input_ids", ["batch", "seq"]),
                               ("lengths", ["batch"]), ("last", ["batch"]))] + [caches],
                    "outputs": [{"name": "logits", "dims": ["batch", VOCAB]}],
                    "updates": {"key_cache.0": "key_cache.0"},
                },
                "decode": {
                    "inputs": [{"name": "input_ids", "dims": ["batch", 1]}, {"name": "lengths", "dims": ["batch"]},
                               caches],
                    "outputs": [{"name": "logits", "dims": ["batch", VOCAB]}],
                    "updates": {"key_cache.0": "key_cache.0"},
                },
            },
            "buckets": [{"entry": "prefill", "dims": {"batch": b, "seq": s, "context": CONTEXT}}
                        for b in batches for s in chunks]
                       + [{"entry": "decode", "dims": {"batch": b, "context": CONTEXT}} for b in batches],
        }  # fmt: skip
        self.batches = batches

    def state(self, entry, batch=1, **dims):
        assert dims.get("context", 0) <= CONTEXT
        return {"key_cache.0": np.zeros((min(b for b in self.batches if b >= batch), CONTEXT, 1), np.float32)}

    def logits(self, tokens):
        """Scores after ``tokens``, from all of them."""
        return sum(self.table[t] * np.cos(self.place[i]) / (len(tokens) - i) for i, t in enumerate(tokens))

    def run(self, entry, **inputs):
        ids, lengths, cache = inputs["input_ids"], inputs["lengths"], inputs["key_cache.0"]
        size = ids.shape[1]
        self.calls.append((entry, size))
        out = np.zeros((len(ids), VOCAB), np.float32)
        for row, (tokens, length) in enumerate(zip(ids, lengths, strict=True)):
            assert size <= length <= CONTEXT
            cache[row, length - size : length, 0] = tokens
            at = length - size + (int(inputs["last"][row]) if entry == "prefill" else 0)
            out[row] = self.logits([int(t) for t in cache[row, : at + 1, 0]])
        return out

    def greedy(self, prompt, most, stop=(STOP,)):
        tokens = list(prompt)
        for _ in range(most):
            token = int(self.logits(tokens).astype(np.float32).argmax())
            if token in stop:
                break
            tokens.append(token)
        return tokens[len(prompt) :]


@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_recomputing_everything(seed):
    toy = Toy(seed)
    prompts = [[1, 2, 3], [4], [5, 6, 1, 2, 3, 4, 5], [2, 2]]
    found = generate(toy, prompts, max_new_tokens=10)
    assert found.tokens == [toy.greedy(prompt, 10) for prompt in prompts]
    assert found.prompt_tokens == 13
    assert found.new_tokens == sum(map(len, found.tokens))
    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        assert generate(toy, [prompt], max_new_tokens=10).tokens == [tokens]


def test_prompts_are_read_in_compiled_chunks_that_stay_inside_the_cache():
    toy = Toy(chunks=(16,), stop=())
    prompt = list(np.random.default_rng(0).integers(1, VOCAB, 22))
    assert generate(toy, [prompt], max_new_tokens=2).tokens == [toy.greedy(prompt, 2, stop=())]
    assert toy.calls == [("prefill", 16), ("prefill", 16), ("decode", 1)]


def test_too_long_is_an_error_before_anything_runs():
    toy = Toy()
    with pytest.raises(InputError, match=r"within 24, got 20 \+ 5"):
        generate(toy, [[1] * 20], max_new_tokens=5)
    for wrong, message in (
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"sampling": Sampling(1.0), "beams": 2}, "both"),
    ):
        with pytest.raises(InputError, match=message):
            generate(toy, [[1]], **wrong)
    with pytest.raises(InputError, match="at least one prompt"):
        generate(toy, [])
    with pytest.raises(InputError, match="at least one token"):
        generate(toy, [[]])
    assert not toy.calls
    toy.manifest["generation"] = None
    with pytest.raises(InputError, match="does not write text"):
        generate(toy, [[1]])


def test_tokens_come_as_they_are_written_and_stop_tokens_do_not():
    toy = Toy(3)
    prompts = [[1, 2], [3]]
    written = [[], []]
    for row, token in stream(toy, prompts, max_new_tokens=8):
        calls = len(toy.calls)
        written[row].append(token)
        assert len(toy.calls) == calls
    assert written == generate(toy, prompts, max_new_tokens=8).tokens
    other = written[0][2]
    assert generate(toy, [prompts[0]], max_new_tokens=8, stop=[other]).tokens == [written[0][: written[0].index(other)]]


def test_suppressed_tokens_are_never_written():
    free = generate(Toy(1, stop=()), [[1]], max_new_tokens=12).tokens[0]
    held = generate(Toy(1, stop=(), suppress=(free[0],)), [[1]], max_new_tokens=12).tokens[0]
    assert free[0] not in held
    toy = Toy(1, stop=(), suppress_first=(free[0],))
    for options in ({}, {"beams": 2}):
        (later,) = generate(toy, [[1]], max_new_tokens=12, **options).tokens
        assert free[0] != later[0]
    (later,) = generate(toy, [[1]], max_new_tokens=12).tokens
    assert later[1:] == toy.greedy([1, later[0]], 11, stop=())


def test_draws_are_seeded_and_follow_the_probabilities():
    logits = np.array([2.0, 1.0, 0.0, -1.0, 1.5, -9.0])
    for sampling in (Sampling(0.7, seed=0), Sampling(1.3, top_k=3, seed=1), Sampling(1.0, top_p=0.8, seed=2)):
        rows = 4000
        tokens = Sampler(sampling, rows)(np.tile(logits, (rows, 1)))
        assert (tokens == Sampler(sampling, rows)(np.tile(logits, (rows, 1)))).all()
        allowed, chances = candidates(logits, sampling)
        assert set(tokens) <= set(allowed)
        counts = np.array([(tokens == token).sum() for token in allowed])
        chi2 = ((counts - rows * chances) ** 2 / (rows * chances)).sum()
        assert chi2 < 25
    assert list(candidates(logits, Sampling(1.0, top_k=3))[0]) == [0, 4, 1]
    # 0.48 + 0.29 = 0.77 < 0.8: the third is what reaches it.
    assert list(candidates(logits, Sampling(1.0, top_p=0.8))[0]) == [0, 4, 1]
    assert list(candidates(logits, Sampling(1.0, top_p=0.01))[0]) == [0]
    for wrong in ({"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(InputError, match="expected"):
            Sampling(**wrong)


def test_a_row_draws_the_same_whatever_stands_beside_it():
    toy = Toy(5, stop=())
    sampling = Sampling(1.0, seed=11)
    together = generate(toy, [[1], [2, 3]], max_new_tokens=6, sampling=sampling).tokens
    assert generate(toy, [[1]], max_new_tokens=6, sampling=sampling).tokens == together[:1]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_beam_search_with_every_beam_is_exhaustive(seed, penalty):
    toy = Toy(seed, batches=(1, 4, 64, 512))
    longest = 3
    best, best_score = None, -np.inf
    for length in range(1, longest + 1):
        for tokens in itertools.product(range(VOCAB), repeat=length):
            ended = tokens[-1] == STOP
            if STOP in tokens[:-1] or (length < longest and not ended):
                continue
            total = sum(
                log_softmax(toy.logits([3, *tokens[:i]]).astype(np.float32))[token] for i, token in enumerate(tokens)
            )
            score = total / length**penalty
            if score > best_score:
                best, best_score = tokens, score
    found = generate(toy, [[3]], max_new_tokens=longest, beams=VOCAB**2 + 1, length_penalty=penalty)
    assert found.tokens == [[token for token in best if token != STOP]]
    assert found.scores[0] == pytest.approx(best_score, rel=1e-6)


@pytest.mark.parametrize("saved", [False, True])
def test_beams_of_a_batch_equal_beams_alone(saved):
    toy = Toy(2, batches=(1, 4, 8))
    if saved:
        toy.manifest = json.loads(json.dumps(toy.manifest))
    prompts = [[1, 2, 3], [4]]
    together = generate(toy, prompts, max_new_tokens=6, beams=3)
    assert together.tokens == [generate(toy, [p], max_new_tokens=6, beams=3).tokens[0] for p in prompts]
    assert (together.prompt_tokens, together.prefill_secs) == (4, 0.0)
    assert max(map(len, together.tokens)) <= together.decode_steps <= 6
    assert together.decode_secs > 0


def test_beams_are_the_models_own_where_nothing_else_is_asked():
    toy, searched = Toy(2), {"beams": 3, "length_penalty": 0.4}
    plain = generate(toy, [[3]], max_new_tokens=6)
    asked = generate(toy, [[3]], max_new_tokens=6, **searched)
    toy.manifest["generation"] |= searched
    assert generate(toy, [[3]], max_new_tokens=6) == dataclasses.replace(asked, decode_secs=mock.ANY)
    assert generate(toy, [[3]], max_new_tokens=6, length_penalty=1.0).scores != asked.scores
    assert generate(toy, [[3]], max_new_tokens=6, beams=1).tokens == plain.tokens
    assert not generate(toy, [[3]], max_new_tokens=6, sampling=Sampling(1.0, seed=0)).scores
    assert [token for _, token in stream(toy, [[3]], max_new_tokens=6)] == plain.tokens[0]


def test_beams_of_more_prompts_than_there_is_room_for_take_turns():
    roomy, small = Toy(2, batches=(1, 4, 8)), Toy(2, batches=(1, 4))
    prompts = [[1, 2, 3], [4], [5, 1]]
    found = generate(small, prompts, max_new_tokens=6, beams=3)
    expected = [generate(roomy, [prompt], max_new_tokens=6, beams=3) for prompt in prompts]
    assert found.tokens == [one.tokens[0] for one in expected]
    assert found.scores == [one.scores[0] for one in expected]
    assert (found.prompt_tokens, found.decode_steps) == (6, sum(one.decode_steps for one in expected))
    small.manifest["generation"]["beams"] = 5
    assert generate(small, prompts, max_new_tokens=6).tokens == [small.greedy(prompt, 6) for prompt in prompts]
