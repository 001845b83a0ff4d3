"""What ``compile`` saves: a folder with the shared library, packed weights, and a manifest that accounts for both.

NAME.attn/
  manifest.json   format, target, versions, entries, shape buckets, each kernel's record or ``default``, sha256 sums
  kernels.so      every kernel and the Relax VM executable
  weights.bin     packed weights, each at a multiple of 64 bytes, mapped into memory
  tokenizer.json  where the model has one; or vocabulary.json, of symbols
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import ArtifactError
from attntune.host import host_features, host_triple
from attntune.measure.buffers import numpy_dtype
from attntune.target import Target

FORMAT = 1
ALIGNMENT = 64
MANIFEST = "manifest.json"
LIBRARY = "kernels.so"
WEIGHTS = "weights.bin"
_HUGE_PAGE = 2 << 20


@dataclass
class Artifact:
    """A compiled model, not yet loaded."""

    manifest: dict[str, Any]
    folder: Path
    """Where its files are; a temporary folder until it is saved."""

    @property
    def kernels(self) -> list[dict[str, Any]]:
        """One entry a kernel: workload, template, config, ``source`` (exact, transferred, default), median seconds."""
        return list(self.manifest["kernels"])

    def save(self, path: str | Path) -> Path:
        """Write the artifact to folder ``path``, replacing an artifact that is there; returns the path.

        Raises:
            ArtifactError: when ``path`` exists and is not an artifact.
        """
        path = Path(path)
        if path.exists() and not (path / MANIFEST).is_file():
            raise ArtifactError(f"{path} exists and is not an attntune artifact; choose another path or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=path.name + ".", dir=path.parent))
        shutil.copytree(self.folder, staging, dirs_exist_ok=True)
        os.chmod(staging, 0o755)
        if path.exists():
            shutil.rmtree(path)
        staging.rename(path)
        return path


def write_weights(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Write arrays one after another, aligned; returns the index for the manifest."""
    index: dict[str, dict[str, Any]] = {}
    with path.open("wb") as file:
        for name, array in arrays.items():
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            index[name] = {"offset": file.tell(), "shape": list(array.shape), "dtype": str(array.dtype)}
            file.write(np.ascontiguousarray(array).tobytes())
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
    return index


def map_weights(path: Path, index: Mapping[str, Mapping[str, Any]], *, huge: bool = False) -> dict[str, np.ndarray]:
    """Views into the mapped file: pages are shared between processes, and a write, were there one, stays private.

    ``huge``: into a copy of the file on huge pages instead, where the system has them. A model that writes token after
    token reads all its weights for each, as fast as memory gives them: 0 to 8 % faster so (Zen 4; SmolLM2-135M).
    """
    raw = _on_huge_pages(path) if huge else None
    if raw is None:
        raw = np.memmap(path, np.uint8, mode="c")
    arrays = {}
    for name, entry in index.items():
        dtype, shape = numpy_dtype(entry["dtype"]), tuple(entry["shape"])
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.asarray(raw[entry["offset"] : entry["offset"] + size]).view(dtype).reshape(shape)
    return arrays


def _on_huge_pages(path: Path) -> np.ndarray | None:
    """The file's bytes in memory of this process alone; None where huge pages cannot be asked for."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    size = path.stat().st_size
    if advice is None or size < _HUGE_PAGE:
        return None
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(advice)
    except OSError:
        return None
    raw = np.frombuffer(memory, np.uint8)
    start = -raw.ctypes.data % _HUGE_PAGE
    raw = raw[start : start + size]
    with path.open("rb") as file:
        file.readinto(raw.data)
    return raw


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, manifest: dict[str, Any]) -> Artifact:
    """Write the manifest with the sums of every other file in ``folder``."""
    files = sorted(p for p in folder.iterdir() if p.name != MANIFEST)
    manifest = {**manifest, "format": FORMAT, "files": {p.name: sha256(p) for p in files}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return Artifact(manifest, folder)


def open_artifact(path: str | Path) -> Artifact:
    """Check an artifact and that this machine can run it.

    Raises:
        ArtifactError: when it is no artifact, is damaged or incomplete, is of a newer format, or needs ISA features
            that this CPU lacks. Whether a CUDA device runs it is seen when it is loaded on one.
    """
    folder = Path(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is not an attntune artifact: it has no {MANIFEST}") from None
    except NotADirectoryError:
        raise ArtifactError(f"{folder} is not an attntune artifact: expected a folder with a {MANIFEST}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{folder / MANIFEST} is damaged: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise ArtifactError(f"{folder / MANIFEST} is damaged: expected an object with a format number")
    if manifest["format"] > FORMAT:
        raise ArtifactError(
            f"{folder} has format {manifest['format']}, this attntune reads up to {FORMAT}; upgrade attntune"
        )
    if missing := {"files", "target", "entries", "buckets", "weights", "kernels"} - set(manifest):
        raise ArtifactError(f"{folder / MANIFEST} is damaged: it lacks {sorted(missing)}")
    check_host(Target.from_json(manifest["target"]), str(folder))
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise ArtifactError(f"{folder} is incomplete: expected the file {name}")
        if (found := sha256(file)) != expected:
            raise ArtifactError(f"{file} is damaged: expected sha256 {expected[:12]}…, found {found[:12]}…")
    return Artifact(manifest, folder)


def check_host(target: Target, what: str) -> None:
    """Raise :class:`ArtifactError` unless this machine has what ``target`` was compiled for."""
    if target.kind != "cpu":
        return
    machine, host = target.triple.split("-")[0], host_triple().split("-")[0]
    if machine != host:
        raise ArtifactError(f"{what} was compiled for {machine} ({target.name}), this machine is {host}")
    if lacking := sorted(set(target.features) - set(host_features())):
        raise ArtifactError(
            f"{what} was compiled for {target.name}, whose ISA features {lacking} this CPU lacks; "
            "compile it for this machine with: attntune compile … --target native"
        )
