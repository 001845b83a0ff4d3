"""``attntune run``: an artifact or a model on sentences, sounds or arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attntune.cli.common import Reply, existing, existing_model, note
from attntune.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from attntune.runtime import TunedModel

_LABEL_WIDTH = 48


def run(
    artifact: Annotated[
        Path, typer.Argument(help="What `attntune compile` wrote, or a model, compiled once; preset:NAME too.")
    ],
    text: Annotated[list[str] | None, typer.Option("--text", "--prompt", help="Repeat for several.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A WAV file to transcribe; repeat for several.")] = None,
    inputs: Annotated[Path | None, typer.Option(help="Arrays by input name, an .npz file.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where results go, an .npz file.")] = None,
    entry: Annotated[str | None, typer.Option(help="Entry point; embed for --text where there is one.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, if not in or beside the artifact.")] = None,
    precision: Annotated[str | None, typer.Option(help="What a model is compiled in; float32 by default.")] = None,
    attention: Annotated[Path | None, typer.Option(help="Draw attention weights to this .html or .png.")] = None,
    query: Annotated[str | None, typer.Option(help="Token of which --attention shows what it attends to.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to write at most.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the draws; 0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens that reach probability p.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    beams: Annotated[int | None, typer.Option(help="More than 1: beam search; by default as the model says.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Of beam search; larger: longer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string before which the text ends.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each text through the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: what the conversation begins with.")] = None,
    json_output: bool = False,
) -> Reply:
    """Run an artifact or a model.

    On --text an encoder prints similarities, a model that writes its text as it comes; --audio is transcribed; --inputs
    reads arrays (with --max-new-tokens: of token ids to write on from) and --output writes them; --chat without --text
    is a conversation, one line of standard input a turn.
    """
    from attntune.cli.open_model import open_model
    from attntune.cli.run_generation import Options, run_generation

    options = Options(
        max_new_tokens, temperature, top_k, top_p, seed, beams, length_penalty, tuple(stop or ()), chat, system
    )  # fmt: skip
    given = [name for name, value in (("text", text), ("audio", audio), ("inputs", inputs)) if value]
    converses = chat and not given
    if len(given) != 1 and not converses:
        raise InputError("expected either --text or --audio, once or more, or --inputs FILE.npz; or --chat alone")
    if system is not None and not chat:
        raise InputError("expected --system with --chat")
    if attention is not None:
        from attntune.cli import attention as maps

        asked = [name for name in options.asked() if name != "--max-new-tokens"]
        asked += [name for name, value in (("--entry", entry), ("--output", output)) if value is not None]
        if converses or asked:
            raise InputError(
                f"expected --attention with --text, --audio or --inputs, and without {', '.join(asked or ['--chat'])}"
            )
        arrays = None if inputs is None else read_arrays(inputs)
        path = existing_model(artifact)
        return maps.attention(
            path, attention, text, audio, arrays, tokenizer=tokenizer, query=query, precision=precision,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip
    named = None if tokenizer is None else existing(tokenizer, "a tokenizer.json")
    tuned, folder = open_model(artifact, precision)
    if tuned.manifest.get("generation") and inputs is None and entry is None:
        from attntune.runtime.text import Codec

        codec = Codec(folder, named)
        if converses:
            from attntune.cli.chat import converse

            return converse(tuned, codec, options, live=not json_output)
        return run_generation(tuned, codec, text or [], audio or [], options, live=not json_output)
    if tuned.manifest.get("generation") and inputs is not None and entry is None and options.asked():
        from attntune.cli.run_generation import run_arrays

        return run_arrays(tuned, read_arrays(inputs), options, output)
    if audio or options.asked():
        asked = [*(["--audio"] if audio else []), *options.asked()]
        raise InputError(f"{tuned.manifest['name']} does not write text here: expected no {', '.join(asked)}")
    return _run_entry(tuned, folder, text, inputs, output, entry, named)


def _run_entry(
    tuned: TunedModel, artifact: Path, text: Sequence[str] | None, inputs: Path | None, output: Path | None,
    entry: str | None, tokenizer: Path | None,
) -> Reply:  # fmt: skip
    """One call of one entry."""
    chosen = entry or ("embed" if text and "embed" in tuned.entries else tuned.entries[0])
    if chosen not in tuned.entries:
        raise InputError(f"{artifact} has no entry {chosen!r}; expected one of {sorted(tuned.entries)}")
    signature = tuned.manifest["entries"][chosen]
    if text:
        longest = max(bucket["dims"]["seq"] for bucket in tuned.manifest["buckets"] if bucket["entry"] == chosen)
        arrays = tokenize(text, find_tokenizer(artifact, tokenizer), signature["inputs"], longest)
    else:
        assert inputs is not None
        arrays = read_arrays(inputs)
    found = tuned.run(chosen, **arrays)
    names = [spec["name"] for spec in signature["outputs"]]
    results = dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))
    if output is not None:
        import numpy as np

        output.parent.mkdir(parents=True, exist_ok=True)
        np.savez(output, **results)  # type: ignore[arg-type]
    if text and chosen == "embed":
        return _similarities(text, next(iter(results.values())), output)
    labels = tuned.manifest["config"].get("labels")
    if labels and chosen == "forward":
        return _classes(results["logits"], labels, output)
    shapes = {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in results.items()}
    where = f" -> {output}" if output is not None else ""
    lines = [f"{name}: {array.dtype} {tuple(array.shape)}{where}" for name, array in results.items()]
    return Reply({"entry": chosen, "outputs": shapes, "output": str(output) if output else None}, "\n".join(lines))


def find_tokenizer(artifact: Path, named: Path | None) -> Path:
    """``named``, or tokenizer.json inside the artifact, or beside it.

    Raises:
        InputError: there is none.
    """
    if named is not None:
        return existing(named, "a tokenizer.json")
    for folder in (artifact, artifact.parent):
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
    raise InputError(f"expected tokenizer.json in {artifact} or beside it; name one with --tokenizer")


def tokenize(
    texts: Sequence[str], path: Path, inputs: Sequence[Mapping[str, Any]], longest: int
) -> dict[str, np.ndarray]:
    """int64 arrays (batch, seq) for those ``inputs`` that a tokenizer makes.

    Texts are padded to the longest of them and cut, with a note, to ``longest`` tokens.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError("--text needs the tokenizers package: pip install 'attntune[models]'") from None
    import numpy as np

    tokenizer = Tokenizer.from_file(str(path))
    padding = tokenizer.padding or {}
    tokenizer.enable_padding(pad_id=padding.get("pad_id", 0), pad_token=padding.get("pad_token", "[PAD]"))
    tokenizer.enable_truncation(longest)
    encodings = tokenizer.encode_batch(list(texts))
    for text, encoding in zip(texts, encodings, strict=True):
        if encoding.overflowing:
            note(f"cut to {longest} tokens, the longest shape that was compiled: {_label(text)}")
    made = {
        "input_ids": [encoding.ids for encoding in encodings],
        "attention_mask": [encoding.attention_mask for encoding in encodings],
        "token_type_ids": [encoding.type_ids for encoding in encodings],
    }
    return {spec["name"]: np.array(made[spec["name"]], dtype=np.int64) for spec in inputs if spec["name"] in made}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name; raises :class:`InputError` when it is not one."""
    import zipfile

    import numpy as np

    try:
        with np.load(existing(path, "an .npz file of inputs"), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, OSError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"expected an .npz file of arrays at {path}: {error}") from None


def _label(text: str) -> str:
    return text if len(text) <= _LABEL_WIDTH else text[: _LABEL_WIDTH - 1] + "…"


def _classes(logits: np.ndarray, labels: Sequence[str], output: Path | None) -> Reply:
    """The most probable class of each row."""
    from scipy.special import softmax

    shares = softmax(logits.astype("float64"), axis=1)
    best = shares.argmax(axis=1)
    found = [
        {"label": labels[index], "probability": float(row[index])} for index, row in zip(best, shares, strict=True)
    ]
    lines = [f"{number:>4}  {labels[index]}  {shares[number, index]:.1%}" for number, index in enumerate(best[:20])]
    if len(best) > len(lines):
        lines.append(f"and {len(best) - len(lines)} more")
    where = str(output) if output is not None else None
    return Reply({"classes": found, "output": where}, "\n".join(lines))


def _similarities(texts: Sequence[str], vectors: np.ndarray, output: Path | None) -> Reply:
    matrix = vectors @ vectors.T
    shown = [_label(text) for text in texts]
    width = max(map(len, shown))
    lines = [" " * (width + 4) + "".join(f"{i + 1:>8}" for i in range(len(texts)))]
    for i, label in enumerate(shown):
        lines.append(f"{i + 1:>2}  {label.ljust(width)}" + "".join(f"{float(v):8.3f}" for v in matrix[i]))
    document = {
        "texts": list(texts),
        "similarity": [[float(v) for v in row] for row in matrix],
        "dimensions": int(vectors.shape[1]),
        "output": str(output) if output is not None else None,
    }
    return Reply(document, "\n".join(lines))
