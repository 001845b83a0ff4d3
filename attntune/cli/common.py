"""What every verb shares: ``--json``, ``--traceback``, error messages, and readings of common options."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attntune.errors import ArtifactError, AttntuneError, InputError

if TYPE_CHECKING:
    from attntune.models import Model

TargetOption = Annotated[
    str, typer.Option(help="native, a preset such as znver4, a preset with options (znver4,cores=8), or a TVM target.")
]
DatabaseOption = Annotated[Path | None, typer.Option(help="Tuning records, a JSON-lines file.")]
PrecisionOption = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, int8 (weights and activations of linear layers; the rest bfloat16), int8_float32 (the "
        "rest float32), int4 (weights; the rest float32) or w4a8 (and activations of linear layers in 8 bits)."
    ),
]
_SHAPES = typer.Option(
    help="Batch x sequence length, of an encoder-decoder batch x source length x target length, separated by commas: "
    "1x128,8x128 or 1x64x32. By name where that is not enough: 1x512xcontext=2048, batch=8."
)
ShapesOption = Annotated[str, _SHAPES]
OptionalShapes = Annotated[str | None, _SHAPES]
EntriesOption = Annotated[str | None, typer.Option(help="Entry points, such as forward,attend.")]


@dataclass(frozen=True)
class Reply:
    """What a verb answers: one JSON document, and the same for people."""

    document: Any
    text: str
    exit_code: int = 0


def command(verb: Callable[..., Reply]) -> Callable[..., None]:
    """``verb`` as a typer command with ``--json`` and ``--traceback``.

    Standard output carries the answer and nothing else; progress and errors go to standard error. An
    :class:`AttntuneError` becomes its message and exit code 2; any other exception is a bug and keeps its traceback.
    A verb with a parameter ``json_output`` is told, so as not to print as it goes.
    """
    signature = inspect.signature(verb, eval_str=True)

    @functools.wraps(verb)
    def run(*, json_output: bool, traceback: bool, **arguments: Any) -> None:
        if "json_output" in signature.parameters:
            arguments["json_output"] = json_output
        try:
            reply = verb(**arguments)
        except AttntuneError as error:
            if traceback:
                raise
            _report_error(error, json_output)
            raise typer.Exit(2) from None
        if json_output:
            print(to_json(reply.document))
        elif reply.text:
            print(reply.text)
        sys.stdout.flush()
        raise typer.Exit(reply.exit_code)

    extra = [
        _flag("json_output", "--json", "Print one JSON document on standard output."),
        _flag("traceback", "--traceback", "Show where an error came from."),
    ]
    parameters = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != "json_output"
    ]
    del run.__wrapped__  # type: ignore[attr-defined]
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters, *extra], return_annotation=None
    )
    run.__annotations__ = {p.name: p.annotation for p in [*parameters, *extra]}
    return run


def _flag(name: str, option: str, text: str) -> inspect.Parameter:
    annotation = Annotated[bool, typer.Option(option, help=text)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


def _report_error(error: AttntuneError, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
    print(f"error: {error}", file=sys.stderr)


def to_json(document: Any) -> str:
    """``document`` as JSON that every reader accepts."""
    return json.dumps(_finite(document), indent=1, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    """``value`` with null for the infinities and NaNs that JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def note(text: str) -> None:
    """One line for people, on standard error."""
    print(text, file=sys.stderr, flush=True)


def parse_shapes(text: str) -> list[dict[str, int]]:
    """``"1x128,8x128"`` as ``[{"batch": 1, "seq": 128}, {"batch": 8, "seq": 128}]``.

    Three numbers are those of an encoder-decoder: ``"1x64x32"`` as batch, source and target. Other dimensions are
    given by name, ``"1x128xcontext=2048"``, or all of them: ``"batch=8"``, ``"batch=1xtarget=100"``.

    Raises:
        InputError: naming the part that is none of these, with positive numbers.
    """
    from attntune.models.shapes import PLACES

    shapes = []
    for part in text.split(","):
        found = [
            re.fullmatch(r"\s*(?:([a-z]+)=)?([1-9]\d*)\s*", item) for item in re.split(r"(?<=\d)\s*[x\u00d7]\s*", part)
        ]
        plain = list(itertools.takewhile(lambda match: match is not None and match[1] is None, found))
        places: Mapping[int, Sequence[str]] = {**PLACES, 1: ("batch",)} if len(plain) < len(found) else PLACES
        names = [*places.get(len(plain), ()), *(match[1] for match in found[len(plain) :] if match is not None)]
        if None in found or len(names) != len(found) or len(set(names) - {None}) != len(found):
            raise InputError(
                f"expected shapes such as 1x128,8x128 (batch x sequence length), 1x64x32 (batch x source length x "
                f"target length) or 1x128xcontext=2048, got {part!r} in {text!r}"
            )
        shapes.append({name: int(match[2]) for name, match in zip(names, found, strict=True) if match is not None})
    return shapes


def parse_names(text: str | None) -> list[str] | None:
    """``"forward, attend"`` as a list; None stays None."""
    return None if text is None else [name.strip() for name in text.split(",")]


def load_model(source: str) -> Model:
    """The model in a directory or file, of a hub id, or a preset; raises :class:`ModelError`."""
    from attntune import models

    return models.from_pretrained(source)


def existing(path: Path, what: str, error: type[AttntuneError] = InputError) -> Path:
    """``path``, or ``error`` saying that ``what`` was expected there."""
    if not path.exists():
        raise error(f"expected {what} at {path}, found nothing there")
    return path


def existing_model(path: Path) -> Path:
    """``path`` of an artifact or a model, which may be ``preset:NAME`` too; raises :class:`ArtifactError`."""
    return path if is_preset(path) else existing(path, "an artifact or a model", ArtifactError)


def is_preset(path: Path) -> bool:
    """Whether it names a preset."""
    from attntune.models.presets import PREFIX

    return str(path).startswith(PREFIX)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned plain text, the same in a terminal and in a pipe; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    numeric = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *(line(row) for row in cells)])


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?( ?[%x×µmn]?s?)?|-|", cell))


def seconds_text(secs: float | None) -> str:
    """A duration for people: ``12.3 us``, ``4.56 ms``, ``1.20 s``; ``-`` when there is none."""
    if secs is None or not math.isfinite(secs):
        return "-"
    for scale, unit in ((1e-6, "us"), (1e-3, "ms")):
        if secs < 1000 * scale:
            return f"{secs / scale:.3g} {unit}"
    return f"{secs:.3g} s"


def fields_text(fields: Mapping[str, object]) -> str:
    """``name  value`` lines."""
    width = max((len(name) for name in fields), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in fields.items())
