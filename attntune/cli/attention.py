"""``attntune run --attention``: attention weights of a model or an artifact, drawn with the real tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attntune.cli.common import Reply, load_model, note
from attntune.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from attntune.models import Model
    from attntune.runtime import TunedModel

ENTRY = "attend"


def attention(
    path: Path,
    output: Path,
    texts: Sequence[str] | None,
    arrays: Mapping[str, np.ndarray] | None,
    *,
    tokenizer: Path | None = None,
    query: str | None = None,
) -> Reply:
    """Run the entry ``attend`` and draw its weights.

    Args:
        path: an artifact that has the entry, or a model's directory, compiled for just this.
        output: ``.html`` or ``.png``.
        texts: one map each; or else ``arrays``, inputs by name.
        arrays: of the entry's inputs.
        tokenizer: see :func:`attntune.cli.run.find_tokenizer`.
        query: a token, of which is printed what it attends to.
    """
    from attntune.cli.run import find_tokenizer, tokenize
    from attntune.report.attention_maps import attention_maps, write

    named = find_tokenizer(path, tokenizer) if texts else None

    def inputs(signature: Sequence[Mapping[str, Any]], longest: int) -> Mapping[str, np.ndarray]:
        if texts and named is not None:
            return tokenize(texts, named, signature, longest)
        assert arrays is not None
        return arrays

    tuned, given = _opened(path, inputs)
    found = tuned.run(ENTRY, **given)
    outputs = dict(zip([spec["name"] for spec in tuned.manifest["entries"][ENTRY]["outputs"]], found, strict=True))
    rows = _tokens(given, named, tuned)
    maps = [found for row, tokens in enumerate(rows) for found in attention_maps(outputs, row, {"attention": tokens})]
    write(output, maps, title=texts[0] if texts and len(texts) == 1 else tuned.manifest["name"], query=query)
    lines = [f"wrote {output}: {len(maps)} × {maps[0].weights.shape[0]} layers × {maps[0].weights.shape[1]} heads"]
    document: dict[str, Any] = {"attention": str(output), "tokens": rows}
    if query is not None:
        top = maps[0].top(maps[0].find(query))
        lines.append(f"“{query}” attends to, mean of all heads (and the head that does so most):")
        lines += [f"  {token:<16}{weight:6.1%}   layer {layer}, head {head}" for token, weight, (layer, head) in top]
        document["query"] = query
        document["top"] = [
            {"token": token, "weight": weight, "layer": layer, "head": head} for token, weight, (layer, head) in top
        ]
    return Reply(document, "\n".join(lines))


def _opened(path: Path, inputs: Any) -> tuple[TunedModel, Mapping[str, np.ndarray]]:
    """The model to run and its inputs: an artifact as it is, a model's directory compiled for the inputs' shape."""
    import dataclasses

    import attntune

    if (path / "manifest.json").is_file() or not (path / "config.json").is_file():
        tuned = attntune.load(path)
        tuned.require(ENTRY)
        sizes = [bucket["dims"] for bucket in tuned.manifest["buckets"] if bucket["entry"] == ENTRY]
        longest = max(dims.get("seq", 0) for dims in sizes)
        return tuned, inputs(tuned.manifest["entries"][ENTRY]["inputs"], longest)
    model: Model = load_model(str(path))
    entry = model.entry(ENTRY)
    given = inputs([dataclasses.asdict(spec) for spec in entry.inputs], model.max_lengths.get("seq", 0))
    shape: dict[str, int] = {}
    for spec in entry.inputs:
        if spec.name in given:
            shape.update({d: n for d, n in zip(spec.dims, given[spec.name].shape, strict=False) if isinstance(d, str)})
    if missing := [dim for dim in entry.dims() if dim not in shape]:
        raise InputError(f"expected inputs that give {missing} of entry {ENTRY!r}, got {sorted(given)}")
    note(f"compiling {model.name} for {shape}")
    with tempfile.TemporaryDirectory() as folder:
        artifact = attntune.compile(model, shapes=[shape], entries=[ENTRY])
        return attntune.load(artifact.save(Path(folder) / "model.attn")), given


def _tokens(given: Mapping[str, np.ndarray], tokenizer: Path | None, tuned: TunedModel) -> list[list[str]]:
    """The tokens of each row, without padding; positions of an image where there is no text."""
    if "input_ids" not in given:
        batch = len(next(iter(given.values())))
        config = tuned.manifest["config"]
        if "patch_size" not in config:
            raise InputError(f"expected input_ids or images, got {sorted(given)}")
        side = config["image_size"] // config["patch_size"]
        return [["[class]", *(f"{row},{column}" for row in range(side) for column in range(side))]] * batch
    ids = given["input_ids"]
    mask = given.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids) if mask is None else [int(row.nonzero()[0].max(initial=-1)) + 1 for row in mask]
    if tokenizer is None:
        return [[str(token) for token in row[:length]] for row, length in zip(ids, lengths, strict=True)]
    from tokenizers import Tokenizer

    names = Tokenizer.from_file(str(tokenizer))
    return [
        [names.id_to_token(int(token)) or str(token) for token in row[:length]]
        for row, length in zip(ids, lengths, strict=True)
    ]
