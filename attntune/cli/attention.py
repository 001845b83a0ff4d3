"""``attntune run --attention``: attention weights of a model or an artifact, drawn with the real tokens.

Of what is heard the columns are times: the encoder's rows are added up, so many that a page has room for them.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attntune.cli.common import Reply, load_model, note
from attntune.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from attntune.models import Model
    from attntune.runtime import TunedModel

ENTRY = "attend"
#: Columns of what is heard.
_TIMES = 128
#: New tokens of an answer that is drawn, where no number is asked for.
_MOST_TOKENS = 128

#: Inputs by name, and for each row of the batch its tokens as ``attention_maps`` takes them.
Given = tuple[Mapping[str, "np.ndarray"], list[dict[str, list[str]]]]


@dataclasses.dataclass(frozen=True)
class Source:
    """What to run on: texts, sounds, or inputs by name; and how."""

    path: Path
    texts: Sequence[str] | None
    audio: Sequence[Path] | None
    arrays: Mapping[str, np.ndarray] | None
    tokenizer: Path | None
    precision: str | None
    max_new_tokens: int | None

    def arrays_for(self, specs: Sequence[Mapping[str, Any]], longest: int, tokenizer: Path) -> Mapping[str, np.ndarray]:
        """Inputs of one sequence side; texts are cut to ``longest`` tokens."""
        from attntune.cli.run import tokenize

        if self.texts:
            return tokenize(self.texts, tokenizer, specs, longest)
        assert self.arrays is not None
        return self.arrays


def attention(
    path: Path,
    output: Path,
    texts: Sequence[str] | None,
    audio: Sequence[Path] | None,
    arrays: Mapping[str, np.ndarray] | None,
    *,
    tokenizer: Path | None = None,
    query: str | None = None,
    precision: str | None = None,
    max_new_tokens: int | None = None,
) -> Reply:
    """Run the entry ``attend`` and draw its weights; an encoder-decoder first writes its answer to each source.

    Args:
        path: an artifact that has the entry, or a model, compiled for just this.
        output: ``.html`` or ``.png``.
        texts: one map each; or else ``audio``, or ``arrays``, inputs by name.
        audio: WAV files, for a model that hears.
        arrays: of the entry's inputs.
        tokenizer: see :func:`attntune.cli.run.find_tokenizer`.
        query: a token, of which is printed what it attends to.
        precision: to compile a model in; float32 by default.
        max_new_tokens: an encoder-decoder's answer is no longer.

    Raises:
        InputError: the model has no attention, or reads something else than it is given.
    """
    from attntune.report.attention_maps import attention_maps, write

    source = Source(path, texts, audio, arrays, tokenizer, precision, max_new_tokens)
    with _opened(source) as tuned:
        names = [spec["name"] for spec in tuned.require(ENTRY)["inputs"]]
        _check_read(source, tuned.manifest["name"], names)
        writes = arrays is None and "decoder_input_ids" in names
        given, rows = _written(tuned, source) if writes else _read(tuned, source)
        found = tuned.run(ENTRY, **given)
        outputs = dict(zip([spec["name"] for spec in tuned.require(ENTRY)["outputs"]], found, strict=True))
        name = tuned.manifest["name"]
    if audio:
        outputs, times = _by_time(outputs, audio)
        rows = [{**row, "source": labels} for row, labels in zip(rows, times, strict=True)]
    maps = [found for row, tokens in enumerate(rows) for found in attention_maps(outputs, row, tokens)]
    if output.suffix == ".png" and len(rows) == 1:
        maps = maps[:1]
    write(output, maps, title=texts[0] if texts and len(texts) == 1 else name, query=query)
    layers, heads = maps[0].weights.shape[:2]
    lines = [f"wrote {output}: {len(maps)} × {layers} layers × {heads} heads"]
    tokens = [row.get("cross_attention", row["attention"]) for row in rows]
    document: dict[str, Any] = {"attention": str(output), "tokens": tokens}
    if query is not None:
        top = maps[0].top(maps[0].find(query))
        lines.append(f"“{query}” attends to, mean of all heads (and the head that does so most):")
        lines += [f"  {token:<16}{weight:6.1%}   layer {layer}, head {head}" for token, weight, (layer, head) in top]
        document["query"] = query
        document["top"] = [
            {"token": token, "weight": weight, "layer": layer, "head": head} for token, weight, (layer, head) in top
        ]
    return Reply(document, "\n".join(lines))


def _check_read(source: Source, name: str, inputs: Sequence[str]) -> None:
    """Raise :class:`InputError` where a model that reads ``inputs`` is given texts for sounds, or the reverse."""
    if source.arrays is None and ("input_features" in inputs) != bool(source.audio):
        expected = "--audio FILE.wav" if "input_features" in inputs else "--text"
        raise InputError(f"expected {expected} or --inputs: {name} reads nothing else")


@contextmanager
def _opened(source: Source) -> Iterator[TunedModel]:
    """An artifact as it is; a model compiled, for the inputs' own shape where its tokenizer is at hand."""
    import attntune
    from attntune.cli.open_model import open_model

    if (source.path / "manifest.json").is_file():
        yield open_model(source.path, source.precision)[0]
        return
    model: Model = load_model(str(source.path))
    if ENTRY not in model.entries:
        raise InputError(f"{model.name} has no attention to draw; its entries are {sorted(model.entries)}")
    entry = model.entry(ENTRY)
    _check_read(source, model.name, [spec.name for spec in entry.inputs])
    with tempfile.TemporaryDirectory() as folder:
        entries, shape = [ENTRY], {}
        tokenizer = _tokenizer(model, source, Path(folder))
        if source.arrays is None and any(spec.name == "decoder_input_ids" for spec in entry.inputs):
            entries = [name for name in ("encode", "prefill", "decode", ENTRY) if name in model.entries]
            shape = _both_lengths(model, source, tokenizer)
        elif source.arrays is not None or tokenizer is not None:
            specs = [dataclasses.asdict(spec) for spec in entry.inputs]
            given = source.arrays_for(specs, model.max_lengths.get("seq", 512), tokenizer or Path())
            for spec in entry.inputs:
                sizes = given[spec.name].shape if spec.name in given else ()
                shape |= {dim: size for dim, size in zip(spec.dims, sizes, strict=False) if isinstance(dim, str)}
            if missing := [dim for dim in entry.dims() if dim not in shape]:
                raise InputError(f"expected inputs that give {missing} of entry {ENTRY!r}, got {sorted(given)}")
        note(f"compiling {model.name}" + (f" for {shape}" if shape else ""))
        artifact = attntune.compile(
            model, shapes=[shape] if shape else None, entries=entries, precision=source.precision or "float32",
            on_progress=note,
        )  # fmt: skip
        yield attntune.load(artifact.save(Path(folder) / "model.attn"))


def _both_lengths(model: Model, source: Source, tokenizer: Path | None) -> dict[str, int]:
    """The shape for the sources at hand, and the longest answer to them."""
    from attntune.runtime.vocabulary import Vocabulary

    assert model.generation is not None
    rows = source.texts or source.audio or ()
    start = len(model.generation.start)
    longest = model.generation.max_length or start + _MOST_TOKENS
    target = min(longest, start + (source.max_new_tokens or _MOST_TOKENS))
    shape = {"batch": len(rows), "target": target}
    if source.texts:
        if model.vocabulary is not None:
            ids, _ = Vocabulary(model.vocabulary["source"], model.vocabulary["target"]).encode(source.texts)
            shape["source"] = ids.shape[1]
        elif tokenizer is not None:
            from tokenizers import Tokenizer

            encodings = Tokenizer.from_file(str(tokenizer)).encode_batch(list(source.texts))
            shape["source"] = max(len(encoding.ids) for encoding in encodings)
    return shape


def _tokenizer(model: Model, source: Source, folder: Path) -> Path | None:
    """The tokenizer.json that was named, or is in the model's directory, or its loader made."""
    if source.tokenizer is not None:
        return source.tokenizer
    if model.directory is not None and (model.directory / "tokenizer.json").is_file():
        return model.directory / "tokenizer.json"
    if model.tokenizer is None:
        return None
    (folder / "tokenizer.json").write_text(model.tokenizer, encoding="utf-8")
    return folder / "tokenizer.json"


def _longest(tuned: TunedModel, dim: str) -> int:
    """The largest compiled size of a dimension of ``attend``."""
    buckets = [bucket["dims"] for bucket in tuned.manifest["buckets"] if bucket["entry"] == ENTRY]
    return max(int(dims.get(dim, 0)) for dims in buckets)


def _read(tuned: TunedModel, source: Source) -> Given:
    """Inputs of a model with one side, and the tokens of each row without padding; of an image its patches' places."""
    from attntune.cli.run import find_tokenizer

    specs = tuned.require(ENTRY)["inputs"]
    path = None
    if source.texts or source.tokenizer:
        at = tuned.folder if (tuned.folder / "tokenizer.json").is_file() else source.path
        path = find_tokenizer(at, source.tokenizer)
    given = source.arrays_for(specs, _longest(tuned, "seq"), path or Path())
    if "input_ids" not in given:
        config = tuned.manifest["config"]
        if "patch_size" not in config or "pixel_values" not in given:
            raise InputError(f"expected input_ids or images, got {sorted(given)}")
        side = config["image_size"] // config["patch_size"]
        places = ["[class]", *(f"{row},{column}" for row in range(side) for column in range(side))]
        return given, [{"attention": places}] * len(given["pixel_values"])
    ids, mask = given["input_ids"], given.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids) if mask is None else [int(row.nonzero()[0].max(initial=-1)) + 1 for row in mask]
    if "decoder_input_ids" in given:
        lengths = [int(length) for length in given["source_lengths"]]
    tokens = [_names(row[:length], path) for row, length in zip(ids, lengths, strict=True)]
    if "decoder_input_ids" not in given:
        return given, [{"attention": row} for row in tokens]
    written = [_names(row, path) for row in given["decoder_input_ids"]]
    return given, [
        {"attention": row, "cross_attention": row, "source": read} for row, read in zip(written, tokens, strict=True)
    ]


def _written(tuned: TunedModel, source: Source) -> Given:
    """Inputs of an encoder-decoder: the sources, and what it writes for them."""
    import numpy as np

    from attntune.cli.run import find_tokenizer
    from attntune.cli.run_generation import heard
    from attntune.runtime.generation import generate
    from attntune.runtime.text import Codec

    codec = Codec(tuned.folder, source.tokenizer)
    sides = heard(tuned, source.audio) if source.audio else codec.sources(source.texts or ())
    vocabulary = codec.vocabulary
    path = None if vocabulary else find_tokenizer(tuned.folder, source.tokenizer)
    generation = tuned.manifest["generation"]
    start = list(generation["start"])
    limits = [_longest(tuned, "seq"), source.max_new_tokens or _MOST_TOKENS]
    limits += [generation["max_length"] - len(start)] if generation["max_length"] else []
    limits += [
        bucket["dims"]["context"] - len(start)
        for bucket in tuned.manifest["buckets"]
        if bucket["entry"] == "decode" and "context" in bucket["dims"]
    ]
    named = [str(path) for path in source.audio or ()] or list(source.texts or ())
    made = generate(tuned, [[] for _ in named], source=sides, max_new_tokens=max(min(limits), 1)).tokens
    if not all(made):
        raise InputError(f"{tuned.manifest['name']} wrote nothing for {named[made.index([])]!r}")
    whole = [[*start, *map(int, tokens)] for tokens in made]
    rows = []
    for index, row in enumerate(whole):
        names = vocabulary.symbols(row) if vocabulary else _names(row, path)
        rows.append({"attention": names[:-1], "cross_attention": names[1:]})
        if source.texts:
            ids = sides["input_ids"][index, : sides["source_lengths"][index]]
            # Where a source of symbols has one length only, zeros after the text count as text, and say nothing.
            read = [int(token) for token in (np.trim_zeros(ids, "b") if vocabulary else ids)]
            rows[-1]["source"] = vocabulary.source_symbols(read) if vocabulary else _names(read, path)
    return {**sides, "decoder_input_ids": _padded([row[:-1] for row in whole])}, rows


def _by_time(outputs: Mapping[str, np.ndarray], audio: Sequence[Path]) -> tuple[dict[str, np.ndarray], list[list[str]]]:
    """Weights over the encoder's rows added up over equal times, and the times of each recording.

    Queries of the encoder that fall together are averaged. What is padded to 30 s is left out: its weights lack from
    the sums.
    """
    import numpy as np

    from attntune.models.audio import SAMPLE_RATE, SECONDS, read_wav

    heard_secs = [min(len(read_wav(path)) / SAMPLE_RATE, SECONDS) for path in audio]
    encoder_rows = next(value.shape[-1] for name, value in outputs.items() if name.startswith("cross_attention."))
    row_secs = SECONDS / encoder_rows
    every = max(1, round(max(heard_secs) / row_secs) // _TIMES + 1)
    starts = np.arange(0, encoder_rows, every)
    made = {}
    for name, value in outputs.items():
        if name.startswith(("cross_attention.", "encoder_attention.")):
            value = np.add.reduceat(value, starts, axis=-1)
        if name.startswith("encoder_attention."):
            counts = np.diff(np.append(starts, encoder_rows))
            value = np.add.reduceat(value, starts, axis=-2) / counts[:, None].astype(value.dtype)
        made[name] = value
    counts_ = [max(1, math.ceil(secs / row_secs / every)) for secs in heard_secs]
    return made, [[f"{at * every * row_secs:.2f} s" for at in range(count)] for count in counts_]


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Int64 (rows, longest), zeros at the right."""
    import numpy as np

    padded = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def _names(ids: Sequence[int] | np.ndarray, tokenizer: Path | None) -> list[str]:
    """Tokens of a ``tokenizer.json``; the ids themselves without one."""
    if tokenizer is None:
        return [str(token) for token in ids]
    from tokenizers import Tokenizer

    names = Tokenizer.from_file(str(tokenizer))
    return [names.id_to_token(int(token)) or str(token) for token in ids]
