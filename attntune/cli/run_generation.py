"""``attntune run`` of a model that writes: its text as it comes, and how fast it came."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
    beams: int = 1
    length_penalty: float = 1.0
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
    from attntune.runtime.generation import Generated, generate
    from attntune.runtime.sampling import Sampling
    from attntune.runtime.sequences import limit
    from attntune.runtime.text import stream_text

    prompts, source = _inputs(tuned, codec, texts, audio, options)
    most = options.max_new_tokens
    if most is None:
        start = len(tuned.manifest["generation"]["start"]) + max(map(len, prompts))
        most = min(MOST, max(1, (limit(tuned) or start + MOST) - start))
    start_secs = time.perf_counter()
    if options.beams > 1:
        if options.stop or options.temperature > 0:
            raise InputError("expected --beams without --stop and --temperature")
        found = generate(
            tuned, prompts, source=source, max_new_tokens=most, beams=options.beams,
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
    text = "" if live and len(prompts) == 1 and options.beams == 1 else _answers(names, written)
    return Reply(document, text)


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
