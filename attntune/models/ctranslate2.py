"""Tensors of a CTranslate2 model, ``model.bin``.

Source: the format is written by ``ModelSpec._serialize`` of CTranslate2's ``python/ctranslate2/specs/model_spec.py``
(MIT licence) and read by its ``src/models/model.cc``. Little-endian throughout:

- uint32 format version; from 2 on the name of the specification and its uint32 revision;
- uint32 number of variables, each: its name, uint8 rank, a uint32 for each dimension, then from version 4 on a uint8
  type and the uint32 number of bytes, before it the uint8 size and the uint32 number of items; the data, row-major;
- from version 3 on a uint32 number of aliases, each two names: the alias, and the variable it stands for.

A name is a uint16 length and that many bytes, the last of them zero.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attntune.errors import ModelError

#: Newest format that is read.
NEWEST = 6
_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2", 5: "bfloat16"}
#: Of formats before the fourth, which give only an item's size.
_TYPES_BY_SIZE = {4: "<f4", 2: "<i2", 1: "<i1"}
_SCALE = "_scale"


@dataclass(frozen=True)
class CTranslate2Model:
    """What ``model.bin`` holds."""

    specification: str
    """Such as ``WhisperSpec`` or ``TransformerSpec``."""
    revision: int
    tensors: dict[str, np.ndarray]
    """Float32, quantised weights multiplied by their scales; numbers of the architecture are integers of rank 0."""


def read_ctranslate2(path: Path) -> CTranslate2Model:
    """Read ``model.bin``, or the one in a directory.

    Raises:
        ModelError: the file is absent, damaged, of an unknown format, or quantised in a way that is not supported.
    """
    file = path / "model.bin" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"expected weights in {file}, which does not exist")
    reader = _Reader(file.read_bytes(), file)
    version = reader.number("I")
    if not 1 <= version <= NEWEST:
        raise ModelError(f"{file}: CTranslate2 format {version} is not supported; expected 1 to {NEWEST}")
    specification, revision = (reader.name(), reader.number("I")) if version >= 2 else ("TransformerSpec", 1)
    raw: dict[str, np.ndarray] = {}
    for _ in range(reader.number("I")):
        name = reader.name()
        raw[name] = reader.variable(name, version)
    if version >= 3:
        for _ in range(reader.number("I")):
            alias, name = reader.name(), reader.name()
            if name not in raw:
                raise ModelError(f"{file}: {alias} stands for {name}, which is missing")
            raw[alias] = raw[name]
            if name + _SCALE in raw:
                raw[alias + _SCALE] = raw[name + _SCALE]
    return CTranslate2Model(specification, revision, _dequantized(raw, file))


def _dequantized(raw: dict[str, np.ndarray], file: Path) -> dict[str, np.ndarray]:
    """Weights as float32. CTranslate2 stores ``round(weight · scale)``, one a row (int8) or for all (int16)."""
    tensors: dict[str, np.ndarray] = {}
    for name, array in raw.items():
        if array.ndim == 0 or array.dtype == np.int32:
            tensors[name] = array
        elif array.dtype in (np.int8, np.int16) and name + _SCALE in raw:
            scale = np.asarray(raw[name + _SCALE], np.float32)
            if name + "_zero" in raw or scale.size not in (1, array.shape[0]):
                raise ModelError(f"{file}: {name} has scales {scale.shape}; expected one in all or one a row")
            tensors[name] = array.astype(np.float32) / scale.reshape(-1, *[1] * (array.ndim - 1))
        elif array.dtype.kind == "i":
            tensors[name] = array
        elif not name.endswith(_SCALE):
            tensors[name] = array.astype(np.float32)
    return tensors


class _Reader:
    """Walks through the bytes of a file."""

    def __init__(self, data: bytes, file: Path) -> None:
        self._data, self._file, self._at = data, file, 0

    def _take(self, count: int) -> int:
        start = self._at
        if start + count > len(self._data):
            raise ModelError(f"{self._file} is damaged: it ends at byte {len(self._data)}, in the middle of a field")
        self._at += count
        return start

    def number(self, code: str) -> int:
        return int(struct.unpack_from("<" + code, self._data, self._take(struct.calcsize("<" + code)))[0])

    def name(self) -> str:
        length = self.number("H")
        start = self._take(length)
        try:
            return self._data[start : start + length].rstrip(b"\0").decode()
        except UnicodeDecodeError:
            raise ModelError(f"{self._file} is damaged: no name at byte {start}") from None

    def variable(self, name: str, version: int) -> np.ndarray:
        shape = tuple(self.number("I") for _ in range(self.number("B")))
        code = self.number("B")
        dtype = (_TYPES if version >= 4 else _TYPES_BY_SIZE).get(code)
        if dtype is None:
            raise ModelError(f"{self._file}: {name} has the unknown type {code}")
        count = self.number("I")
        wide = dtype == "bfloat16"
        item = np.dtype("<u2" if wide else dtype)
        size = count if version >= 4 else count * item.itemsize
        if size != int(np.prod(shape, dtype=np.int64)) * item.itemsize:
            raise ModelError(f"{self._file} is damaged: {name} has {size} bytes for shape {shape} of {dtype}")
        array = np.frombuffer(self._data, item, offset=self._take(size), count=size // item.itemsize).reshape(shape)
        return (array.astype(np.uint32) << 16).view(np.float32) if wide else array
