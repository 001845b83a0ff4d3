"""What ``attntune run`` is given: an artifact, or a model that is compiled once into the user's cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attntune.cli.common import existing_model, is_preset, load_model, note
from attntune.errors import ArtifactError, InputError, ModelError

if TYPE_CHECKING:
    from attntune.runtime import TunedModel


def open_model(
    path: Path, precision: str | None = None, *, entries: Sequence[str] | None = None,
    shapes: Sequence[Mapping[str, int]] | None = None,
) -> tuple[TunedModel, Path]:  # fmt: skip
    """The model to run, and its artifact's folder.

    A folder with ``manifest.json`` is an artifact. Anything else is a model, compiled for this machine with the best
    schedules known and the shapes of its family into ``CACHE/models``, and compiled again when one of its files,
    attntune or the machine is another.

    Args:
        path: of either.
        precision: to compile a model in; float32 by default.
        entries: to compile of a model; those that are not on request by default.
        shapes: to compile a model for; those of its family by default.

    Raises:
        ArtifactError: there is neither at ``path``.
        InputError: a precision is asked of an artifact, which has its own.
    """
    import attntune
    from attntune.models.precision import fitting
    from attntune.target import Target

    existing_model(path)
    if (path / "manifest.json").is_file():
        tuned = attntune.load(path)
        if precision not in (None, tuned.manifest.get("precision", "float32")):
            raise InputError(f"{path} is compiled in {tuned.manifest['precision']}; run its model with --precision")
        return tuned, path
    fit = fitting(precision or "float32", Target.parse("native"), note)
    wanted = {"precision": fit, "entries": entries, "shapes": shapes}
    folder = _cached(path, wanted)
    if not (folder / "manifest.json").is_file():
        try:
            model = load_model(str(path))
        except ModelError as error:
            raise ArtifactError(f"{path} is not an attntune artifact, nor a model: {error}") from None
        note(f"compiling {model.name} once, into {folder}")
        attntune.compile(model, on_progress=note, **wanted).save(folder)  # type: ignore[arg-type]
        return attntune.load(folder), folder
    tuned = attntune.load(folder)
    if tuned.manifest["precision"] != fit:  # compiling would have said why
        note(f"{tuned.manifest['name']} computes {tuned.manifest['precision']} instead of {fit}")
    return tuned, folder


def _cached(path: Path, wanted: Mapping[str, object]) -> Path:
    from attntune import __version__
    from attntune.host import user_cache_dir
    from attntune.target import Target

    files: list[Path] = []
    if not is_preset(path):
        path = path.resolve()
        files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    facts = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    made_of = "\n".join([str(path), *facts, __version__, Target.parse("native").key(), repr(sorted(wanted.items()))])
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    return user_cache_dir() / "models" / f"{path.stem.replace(':', '-')}-{digest}.attn"
