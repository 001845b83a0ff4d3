"""``attntune run --attention``: attention weights of a model or an artifact, drawn with the real tokens."""

from __future__ import annotations

import dataclasses
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

#: Inputs by name, and for each row of the batch its tokens as ``attention_maps`` takes them.
Given = tuple[Mapping[str, "np.ndarray"], list[dict[str, list[str]]]]


@dataclasses.dataclass(frozen=True)
class Source:
    """What to run on: texts, or inputs by name."""

    path: Path
    texts: Sequence[str] | None
    arrays: Mapping[str, np.ndarray] | None
    tokenizer: Path | None

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
    arrays: Mapping[str, np.ndarray] | None,
    *,
    tokenizer: Path | None = None,
    query: str | None = None,
) -> Reply:
    """Run the entry ``attend`` and draw its weights; an encoder-decoder first writes its answer to each text.

    Args:
        path: an artifact that has the entry, or a model's directory, compiled for just this.
        output: ``.html`` or ``.png``.
        texts: one map each; or else ``arrays``, inputs by name.
        arrays: of the entry's inputs.
        tokenizer: see :func:`attntune.cli.run.find_tokenizer`.
        query: a token, of which is printed what it attends to.
    """
    from attntune.report.attention_maps import attention_maps, write

    source = Source(path, texts, arrays, tokenizer)
    with _opened(source) as tuned:
        names = [spec["name"] for spec in tuned.require(ENTRY)["inputs"]]
        writes = bool(texts) and "decoder_input_ids" in names
        given, rows = _written(tuned, source) if writes else _read(tuned, source)
        found = tuned.run(ENTRY, **given)
        outputs = dict(zip([spec["name"] for spec in tuned.require(ENTRY)["outputs"]], found, strict=True))
        name = tuned.manifest["name"]
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


@contextmanager
def _opened(source: Source) -> Iterator[TunedModel]:
    """An artifact as it is; a model compiled, for the inputs' own shape where its tokenizer is at hand."""
    import attntune

    if (source.path / "manifest.json").is_file():
        yield attntune.load(source.path)
        return
    model: Model = load_model(str(source.path))
    entry = model.entry(ENTRY)
    with tempfile.TemporaryDirectory() as folder:
        entries, shapes = [ENTRY], None
        tokenizer = _tokenizer(model, source, Path(folder))
        if any(spec.name == "decoder_input_ids" for spec in entry.inputs):
            entries = [name for name in ("encode", "prefill", "decode", ENTRY) if name in model.entries]
        elif source.texts is None or tokenizer is not None:
            specs = [dataclasses.asdict(spec) for spec in entry.inputs]
            given = source.arrays_for(specs, model.max_lengths.get("seq", 512), tokenizer or Path())
            shape: dict[str, int] = {}
            for spec in entry.inputs:
                sizes = given[spec.name].shape if spec.name in given else ()
                shape |= {dim: size for dim, size in zip(spec.dims, sizes, strict=False) if isinstance(dim, str)}
            if missing := [dim for dim in entry.dims() if dim not in shape]:
                raise InputError(f"expected inputs that give {missing} of entry {ENTRY!r}, got {sorted(given)}")
            shapes = [shape]
        note(f"compiling {model.name}" + (f" for {shapes[0]}" if shapes else ""))
        artifact = attntune.compile(model, shapes=shapes, entries=entries)
        yield attntune.load(artifact.save(Path(folder) / "model.attn"))


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
    return given, [{"attention": _names(row[:length], path)} for row, length in zip(ids, lengths, strict=True)]


def _written(tuned: TunedModel, source: Source) -> Given:
    """Inputs of an encoder-decoder: the texts, and what it writes for them."""
    import numpy as np

    from attntune.cli.run import find_tokenizer
    from attntune.runtime.generation import generate
    from attntune.runtime.vocabulary import VOCABULARY, Vocabulary

    assert source.texts
    vocabulary, path = None, None
    if (tuned.folder / VOCABULARY).is_file():
        vocabulary = Vocabulary.load(tuned.folder / VOCABULARY)
        ids, lengths = vocabulary.encode(source.texts)
    else:
        from tokenizers import Tokenizer

        path = find_tokenizer(tuned.folder, source.tokenizer)
        encoded = [encoding.ids for encoding in Tokenizer.from_file(str(path)).encode_batch(list(source.texts))]
        ids, lengths = _padded(encoded), np.array([len(row) for row in encoded], np.int32)
    sides = {"input_ids": ids, "source_lengths": lengths}
    generation = tuned.manifest["generation"]
    start = list(generation["start"])
    limits = [_longest(tuned, "seq"), generation["max_length"] - len(start) if generation["max_length"] else 128]
    limits += [
        bucket["dims"]["context"] - len(start)
        for bucket in tuned.manifest["buckets"]
        if bucket["entry"] == "decode" and "context" in bucket["dims"]
    ]
    made = generate(tuned, [[] for _ in source.texts], source=sides, max_new_tokens=max(min(limits), 1)).tokens
    if not all(made):
        raise InputError(f"{tuned.manifest['name']} wrote nothing for {source.texts[made.index([])]!r}")
    whole = [[*start, *map(int, tokens)] for tokens in made]
    rows = []
    for index, row in enumerate(whole):
        source_ids = ids[index, : lengths[index]]
        # Where a source of symbols has one length only, zeros after the text count as text, and say nothing.
        read = [int(token) for token in (np.trim_zeros(source_ids, "b") if vocabulary else source_ids)]
        names = vocabulary.symbols(row) if vocabulary else _names(row, path)
        keys = vocabulary.source_symbols(read) if vocabulary else _names(read, path)
        rows.append({"attention": names[:-1], "cross_attention": names[1:], "source": keys})
    return {**sides, "decoder_input_ids": _padded([row[:-1] for row in whole])}, rows


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
