"""Runs a compiled decoder as a generation loop does: prompts padded at the right, chunk by chunk, token by token."""

from __future__ import annotations

import numpy as np


class Cached:
    """One batch of sequences with its caches; ``seq`` is the compiled length of a chunk."""

    def __init__(self, tuned, batch, seq):
        self.tuned, self.batch, self.seq = tuned, batch, seq
        self.state = tuned.state("prefill", batch)
        self.used = np.zeros(batch, np.int32)

    def prefill(self, chunks):
        """One chunk of at most ``seq`` tokens a sequence → logits after the last token of each."""
        ids = np.full((self.batch, self.seq), 1, np.int64)
        for row, chunk in enumerate(chunks):
            ids[row, : len(chunk)] = chunk
        counts = np.array([len(chunk) for chunk in chunks])
        logits = self.tuned.run(
            "prefill", input_ids=ids, lengths=(self.used + self.seq).astype(np.int32), last=counts - 1, **self.state
        )  # fmt: skip
        self.used = (self.used + counts).astype(np.int32)
        return logits

    def decode(self, tokens):
        """The next token of each sequence → logits after it."""
        self.used = self.used + np.int32(1)
        ids = np.asarray(tokens, np.int64).reshape(self.batch, 1)
        return self.tuned.run("decode", input_ids=ids, lengths=self.used, **self.state)


def assert_cache_equals_recomputation(tuned, ids, expected, seq):
    """Whole and chunked prefill, then decoding, of a batch whose prompts have different lengths.

    ids (batch, n); expected (batch, n, vocab): logits of a full recomputation. Tolerance 1e-3 of the largest logit.
    """
    batch, total = ids.shape
    atol = 1e-3 * np.abs(expected).max()
    lengths = [seq - row * 2 for row in range(batch)]
    for split in (None, seq // 2):
        cached = Cached(tuned, batch, seq)
        starts = [length if split is None else split for length in lengths]
        logits = cached.prefill([ids[row, :start] for row, start in enumerate(starts)])
        if split is not None:
            logits = cached.prefill([ids[row, split:length] for row, length in enumerate(lengths)])
        for step in range(total - seq):
            at = [length + step for length in lengths]
            wanted = np.stack([expected[row, position - 1] for row, position in enumerate(at)])
            np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=atol)
            logits = cached.decode([ids[row, position] for row, position in enumerate(at)])
