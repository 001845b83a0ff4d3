"""``attntune perplexity``: how well a language model expects a text, at each precision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attntune.cli.common import Reply, existing, note, table
from attntune.errors import ArtifactError, InputError


def perplexity(
    model: Annotated[Path, typer.Argument(help="A language model, compiled once, or its artifact with `forward`.")],
    text: Annotated[Path, typer.Argument(help="A text file, UTF-8; runs of white space count as one space.")],
    tokens: Annotated[int | None, typer.Option(min=2, help="Of the text, so many from its beginning.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are seen together.")] = 512,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="See `attntune compile --help`; repeat to compare. Of an artifact: its own."),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, if not in or beside the model.")] = None,
) -> Reply:
    """Perplexity of a text, and how much higher it is than at the first precision named."""
    from attntune.cli.open_model import open_model
    from attntune.runtime.perplexity import perplexity as measure
    from attntune.runtime.text import Codec

    existing(model, "an artifact or a model", ArtifactError)
    try:
        words = existing(text, "a text file").read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8 text in {text}: {error}") from None
    named = None if tokenizer is None else existing(tokenizer, "a tokenizer.json")
    found = []
    for name in precision or [""]:
        tuned, folder = open_model(model, name or None, entries=["forward"], shapes=[{"batch": 1, "seq": window}])
        ids = Codec(folder, named).encode(" ".join(words))[:tokens]
        found.append((tuned.manifest["precision"], measure(tuned, ids, window)))
        note(f"{found[-1][0]}: {found[-1][1].value:.3f}")
    first = found[0][1].value
    rows = [(name, result.tokens, f"{result.value:.3f}", f"{result.value / first - 1:+.1%}") for name, result in found]
    document = {
        "text": str(text),
        "window": window,
        "perplexity": [{"precision": name, "value": r.value, "tokens": r.tokens} for name, r in found],
    }
    return Reply(document, table(("precision", "tokens predicted", "perplexity", "over the first"), rows))
