"""Whole models on a CUDA device against the same models on the CPU: small ones of each family, with seeded weights."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import EngineError
from attntune.models.model import Generation, Model
from attntune.target import Target

#: By name, entries and shapes.
MODELS: Mapping[str, tuple[tuple[str, ...], tuple[Mapping[str, int], ...]]] = {
    "bert": (("forward", "forward_ragged"), ({"batch": 2, "seq": 8},)),
    "llama": (("prefill", "decode"), ({"batch": 2, "seq": 8, "context": 24},)),
    "whisper": (("encode", "prefill", "decode"), ({"batch": 2, "seq": 4, "context": 16},)),
    "rnn": (("forward", "encode", "decode"), ({"batch": 2, "source": 8, "seq": 5},)),
}
#: Those that run in float32 alone: recurrences and additive attention have no kernels of 16 bits.
FLOAT32_ONLY = ("rnn",)
#: Cosine with the CPU's float32 results at least, by precision.
COSINES = {"float32": 0.999999, "float16": 0.999, "bfloat16": 0.999}
_PROMPTS: Mapping[str, list[list[int]]] = {
    "llama": [[5, 6, 7, 8, 9, 11, 12, 30, 3, 4], [1, 2, 3]], "whisper": [[4, 5], [6, 7]], "rnn": [[], []]
}  # fmt: skip


def every_check() -> tuple[tuple[str, str], ...]:
    """Each model with each precision it has on CUDA devices."""
    pairs = [(name, precision) for name in MODELS for precision in COSINES]
    return tuple((name, p) for name, p in pairs if p == "float32" or name not in FLOAT32_ONLY)


def small_model(name: str) -> Model:
    """One of :data:`MODELS`, of sizes that tensor cores take.

    Raises:
        EngineError: there is none of that name.
    """
    if name == "bert":
        from attntune.models.bert import BertConfig, random_model

        return random_model(BertConfig(50, 32, 1, 2, 64, 16, 2, "gelu", 1e-12), "small bert")
    if name == "llama":
        from attntune.models import decoder, llama

        config = dataclasses.replace(
            llama.PRESETS["smollm2-135m"], vocab_size=40, hidden_size=32, num_layers=2, heads=2, kv_heads=1,
            head_dim=16, inner=48, positions=64,
        )  # fmt: skip
        return decoder.build(config, decoder.random_weights(config), "small llama", family="llama")
    if name == "rnn":
        from attntune.models import rnn

        return rnn.random_model(rnn.RNNConfig(20, 24, 12, 12, 20, 24, bidirectional=True, attention=True), "small rnn")
    if name != "whisper":
        raise EngineError(f"unknown model {name!r}; expected one of {sorted(MODELS)}")
    from attntune.models import encoder_decoder

    wider = encoder_decoder.EncoderDecoderConfig(
        vocab_size=40, hidden_size=32, heads=2, encoder_layers=1, decoder_layers=1, inner=64, source_positions=10,
        positions=16, mels=8, activation="gelu", norm_first=True,
    )  # fmt: skip
    generation = Generation("encoder-decoder", start=(1,), stop=(2,), max_length=16)
    weights = encoder_decoder.random_weights(wider)
    return encoder_decoder.build(
        wider, weights, "small whisper", family="whisper", generation=generation, shapes=()
    )  # fmt: skip


def ask(tuned: Any, name: str) -> dict[str, np.ndarray]:
    """Results by what was asked of a loaded model: padding, caches, beams."""
    rng = np.random.default_rng(3)
    if name == "bert":
        ids, mask = rng.integers(0, 50, (3, 7)), np.ones((3, 7), np.int64)
        mask[1, 4:] = 0
        gaps = mask.copy()
        gaps[2, 3] = 0  # a mask that is not padding at the right goes to the entry that computes all
        return {
            "ragged": tuned(input_ids=ids, attention_mask=mask)[mask != 0],
            "masked": tuned(input_ids=ids.astype(np.int32), attention_mask=gaps)[gaps != 0],
        }
    from attntune.runtime.sequences import Sequences

    source: dict[str, np.ndarray] = {}
    if name == "whisper":
        source = {"input_features": rng.standard_normal((2, 8, 20), np.float32)}
    elif name == "rnn":
        source = {"input_ids": rng.integers(0, 20, (2, 7)), "source_lengths": np.array([7, 4], np.int32)}
    one = {key: value[:1] for key, value in source.items()}
    told = tuned.generate(_PROMPTS[name], source=source or None, max_new_tokens=5)
    beams = tuned.generate(_PROMPTS[name][:1], source=one or None, max_new_tokens=4, beams=2)
    rows = Sequences(tuned, _PROMPTS[name], source or None, 4)
    whole = {}
    if name == "rnn":
        whole["whole"] = tuned.run("forward", **source, decoder_input_ids=rng.integers(0, 24, (2, 5)))
    return {
        **whole,
        "logits": np.concatenate([rows.begin(), rows.step(np.array([3, 4]))]),
        "tokens": np.array([*told.tokens[0], -1, *told.tokens[1]]),
        "beams": np.array(beams.tokens[0]),
        "scores": np.array(beams.scores),
    }


def compared(name: str, target: Target, precision: str) -> dict[str, Any]:
    """Least cosine of the device's rows with the CPU's, JSON-ready; tokens are to be the same. In a worker process."""
    from attntune.compiler import compile
    from attntune.runtime import load

    model = small_model(name)
    entries, shapes = MODELS[name]

    def answers(at: str | Target, precision: str, path: Path) -> dict[str, np.ndarray]:
        artifact = compile(model, target=at, shapes=shapes, entries=entries, precision=precision)
        return ask(load(artifact.save(path)), name)

    with tempfile.TemporaryDirectory(prefix="attntune-models-") as folder:
        found = answers(target, precision, Path(folder) / "device.attn")
        expected = answers("native", "float32", Path(folder) / "host.attn")
    worst, differing = least_cosine(found, expected)
    return {"model": name, "precision": precision, "cosine": worst, "differing": differing}


def least_cosine(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> tuple[float, list[str]]:
    """Of rows of floats; and names of integers that are not the same. NaN gives -1."""
    worst, differing = 1.0, []
    for what, values in expected.items():
        if values.dtype.kind == "i":
            differing += [what] * (found[what].tolist() != values.tolist())
            continue
        ours, theirs = (np.asarray(a, np.float64).reshape(-1, values.shape[-1]) for a in (found[what], values))
        cosines = (ours * theirs).sum(-1) / (np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1))
        worst = min(worst, float(np.nan_to_num(cosines, nan=-1.0).min()))
    return worst, differing


def problems(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong in rows of :func:`compared`, or of calls of it that failed."""
    found = []
    for row in rows:
        at = f"{row['model']} {row['precision']}"
        if row.get("error"):
            found.append(f"{at}: {row['error']}")
        elif row["differing"] or row["cosine"] < COSINES[row["precision"]]:
            others = f", other {' and '.join(row['differing'])}" if row["differing"] else ""
            found.append(f"{at}: cosine {row['cosine']:.6f}, expected {COSINES[row['precision']]} at least{others}")
    return found
