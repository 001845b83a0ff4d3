"""``attntune run`` of a model that writes: its text as it comes, and how fast it came."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attntune.cli.common import Reply, note
from attntune.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from attntune.runtime import TunedModel
    from attntune.runtime.generation import Generated
    from attntune.runtime.text import Codec

MOST = 256
"""New tokens when no number is asked for and the model allows as many."""


@dataclass(frozen=True)
class Options:
    """What may be asked of a model that writes."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    beams: int | None = None
    length_penalty: float | None = None
    stop: tuple[str, ...] = ()
    chat: bool = False
    system: str | None = None

    def asked(self) -> list[str]:
        """Names of the options that differ from the defaults, as on the command line."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value != getattr(Options, name)]


def run_generation(
    tuned: TunedModel, codec: Codec, texts: Sequence[str], audio: Sequence[Path], options: Options, *, live: bool
) -> Reply:
    """Write on from texts, or from what is heard in WAV files.

    Args:
        tuned: a model with ``generation`` in its manifest.
        codec: of the model.
        texts: prompts of a decoder, sources of an encoder-decoder.
        audio: WAV files, for a model that hears.
        options: see :class:`Options`.
        live: print a single text as it is written.
    """
    from attntune.runtime.generation import Generated, generate, most_rows, usual_beams
    from attntune.runtime.sampling import Sampling
    from attntune.runtime.text import stream_text

    prompts, source = _inputs(tuned, codec, texts, audio, options)
    most = _most(tuned, prompts, options)
    start_secs = time.perf_counter()
    beams = options.beams
    if beams is None:
        beams = 1 if options.stop or options.temperature > 0 else usual_beams(tuned)
        own = int(tuned.manifest["generation"].get("beams", 1))
        if beams > 1:
            note(f"beam search with {beams} beams, as the model says; --beams 1 is faster and shows text as it comes")
        elif own > most_rows(tuned):
            note(
                f"the likeliest token each time: the model says {own} beams, compiled is a batch of {most_rows(tuned)}"
            )
    if beams > 1:
        if options.stop or options.temperature > 0:
            raise InputError("expected --beams without --stop and --temperature")
        found = generate(
            tuned, prompts, source=source, max_new_tokens=most, beams=beams,
            length_penalty=options.length_penalty,
        )  # fmt: skip
        written = [codec.decode(tokens) for tokens in found.tokens]
        written = [text.lstrip() for text in written] if source else written
    else:
        found = Generated([[] for _ in prompts], prompt_tokens=sum(map(len, prompts)))
        sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
        written = [""] * len(prompts)
        shown = live and len(prompts) == 1
        for row, piece in stream_text(
            tuned, codec, prompts, source=source, max_new_tokens=most, sampling=sampling, stop=options.stop,
            timings=found,
        ):  # fmt: skip
            # A transcript's first token begins with the space between words.
            piece = piece if written[row] or options.chat or not source else piece.lstrip()
            written[row] += piece
            if shown:
                print(piece, end="", flush=True)
        if shown:
            print(flush=True)
    seconds = time.perf_counter() - start_secs
    names = [str(path) for path in audio] or list(texts)
    document = _document(found, names, written, seconds)
    if live:
        note(speed(found, bool(source), seconds))
    text = "" if live and len(prompts) == 1 and beams == 1 else _answers(names, written)
    return Reply(document, text)


def _most(tuned: TunedModel, prompts: Sequence[Sequence[int]], options: Options) -> int:
    """New tokens: as many as were asked for, or else as the model and its cache allow, up to :data:`MOST`."""
    from attntune.runtime.sequences import limit

    if options.max_new_tokens is not None:
        return options.max_new_tokens
    start = len(tuned.manifest["generation"]["start"]) + max(map(len, prompts), default=0)
    return min(MOST, max(1, (limit(tuned) or start + MOST) - start))


def run_arrays(tuned: TunedModel, arrays: Mapping[str, np.ndarray], options: Options, output: Path | None) -> Reply:
    """Write on from token ids, for a model whose tokenizer is not at hand.

    Args:
        tuned: a model with ``generation`` in its manifest.
        arrays: of a decoder ``input_ids`` (batch, seq) and, where rows are shorter than that, ``lengths`` (batch,); of
            an encoder-decoder the inputs of its entry ``encode``.
        options: see :class:`Options`.
        output: an .npz file for ``tokens`` (batch, longest), rows filled with -1, and ``lengths`` (batch,).

    Raises:
        InputError: the arrays are others.
    """
    import numpy as np

    from attntune.runtime.generation import generate
    from attntune.runtime.sampling import Sampling

    if options.stop or options.chat:
        raise InputError("expected --inputs of token ids without --stop, --chat and --system, which are for texts")
    source, prompts = _rows(tuned, arrays)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    start_secs = time.perf_counter()
    found = generate(
        tuned, prompts, source=source, max_new_tokens=_most(tuned, prompts, options), sampling=sampling,
        beams=options.beams, length_penalty=options.length_penalty,
    )  # fmt: skip
    seconds = time.perf_counter() - start_secs
    note(speed(found, source is not None, seconds))
    lines = [" ".join(map(str, row)) for row in found.tokens]
    if output is not None:
        tokens = np.full((len(lines), max(map(len, found.tokens))), -1, np.int64)
        for index, row in enumerate(found.tokens):
            tokens[index, : len(row)] = row
        output.parent.mkdir(parents=True, exist_ok=True)
        np.savez(output, tokens=tokens, lengths=np.array([len(row) for row in found.tokens]))
    document = _document(found, [str(row) for row in range(len(lines))], lines, seconds)
    return Reply({**document, "output": None if output is None else str(output)}, "\n".join(lines))


def _rows(
    tuned: TunedModel, arrays: Mapping[str, np.ndarray]
) -> tuple[Mapping[str, np.ndarray] | None, list[list[int]]]:
    """What the encoder reads, if there is one, and a prompt for each row."""
    entries = tuned.manifest["entries"]
    encodes = "encode" in entries
    wanted = [spec["name"] for spec in entries["encode"]["inputs"]] if encodes else ["input_ids"]
    allowed = wanted if encodes else [*wanted, "lengths"]
    if not set(wanted) <= set(arrays) <= set(allowed):
        raise InputError(f"expected arrays {wanted} to write on from, got {sorted(arrays)}")
    rows = len(arrays[wanted[0]])
    if encodes:
        return arrays, [[] for _ in range(rows)]
    ids = arrays["input_ids"]
    lengths = arrays.get("lengths", [ids.shape[-1]] * rows)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or len(lengths) != rows:
        raise InputError(
            f"expected input_ids (batch, seq) of integers and as many lengths, got {ids.dtype} {ids.shape}"
        )
    return None, [[int(token) for token in row[: int(length)]] for row, length in zip(ids, lengths, strict=True)]


def _inputs(
    tuned: TunedModel, codec: Codec, texts: Sequence[str], audio: Sequence[Path], options: Options
) -> tuple[list[list[int]], dict[str, np.ndarray] | None]:
    """Prompts by row, and what an encoder reads."""
    kind, entries = tuned.manifest["generation"]["kind"], tuned.manifest["entries"]
    hears = "encode" in entries and any(spec["name"] == "input_features" for spec in entries["encode"]["inputs"])
    if hears != bool(audio) or bool(texts) == bool(audio):
        expected = "--audio FILE.wav" if hears else "--text"
        raise InputError(f"expected {expected}, once or more: {tuned.manifest['name']} reads nothing else")
    if kind == "decoder":
        if options.chat:
            system = [] if options.system is None else [{"role": "system", "content": options.system}]
            return [codec.chat([*system, {"role": "user", "content": text}]) for text in texts], None
        return [codec.encode(text) for text in texts], None
    if options.chat:
        raise InputError(f"expected no --chat: {tuned.manifest['name']} answers a source, not a conversation")
    source = heard(tuned, audio) if hears else codec.sources(texts)
    return [[] for _ in audio or texts], source


def heard(tuned: TunedModel, audio: Sequence[Path]) -> dict[str, np.ndarray]:
    """What an encoder reads of WAV files: ``input_features`` (batch, mels, frames) float32."""
    import numpy as np

    from attntune.models.audio import HOP, SAMPLE_RATE, log_mel, read_wav

    _, mels, frames = next(
        spec["dims"] for spec in tuned.manifest["entries"]["encode"]["inputs"] if spec["name"] == "input_features"
    )
    rows = []
    for path in audio:
        samples = read_wav(path)
        if (longest := frames * HOP / SAMPLE_RATE) < len(samples) / SAMPLE_RATE:
            note(f"{path}: only the first {longest:.0f} s of {len(samples) / SAMPLE_RATE:.0f} are heard")
        rows.append(log_mel(samples, mels, longest))
    return {"input_features": np.stack(rows)}


def _document(found: Generated, names: Sequence[str], written: Sequence[str], seconds: float) -> dict[str, Any]:
    document: dict[str, Any] = {
        "inputs": list(names),
        "texts": list(written),
        "tokens": found.tokens,
        "prompt_tokens": found.prompt_tokens,
        "new_tokens": found.new_tokens,
        "seconds": seconds,
    }
    return {**document, "scores": found.scores} if found.scores else {**document, **times(found)}


def times(found: Generated) -> dict[str, float | None]:
    """Of prefill and decoding, for a document."""
    rows = len(found.tokens)
    return {
        "prefill_secs": found.prefill_secs,
        "decode_secs": found.decode_secs,
        "decode_tokens_per_sec": found.decode_steps * rows / found.decode_secs if found.decode_secs else None,
    }


def speed(found: Generated, encoded: bool, seconds: float) -> str:
    """For people: how fast it was read and written.

    Args:
        found: tokens and times.
        encoded: whether an encoder read the source.
        seconds: from the call to the last token.
    """
    if found.scores:
        return f"{found.new_tokens} tokens by beam search in {seconds:.2f} s"
    rows = len(found.tokens)
    first = f"first token after {found.prefill_secs * 1e3:.0f} ms"
    if not encoded and found.prefill_secs:
        new = found.prompt_tokens - found.reused_tokens
        first = f"prefill {new} tokens, {new / found.prefill_secs:.0f} tokens/s"
        first += f", {found.reused_tokens} reused" if found.reused_tokens else ""
    rate = found.decode_steps * rows / found.decode_secs if found.decode_secs else 0.0
    return f"{first}; decode {found.decode_steps * rows} tokens, {rate:.1f} tokens/s"


def _answers(names: Sequence[str], written: Sequence[str]) -> str:
    if len(written) == 1:
        return written[0]
    return "\n".join(f"{name} -> {text}" for name, text in zip(names, written, strict=True))
