"""Run a compiled model: NumPy in and out, torch in and out, from any thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import InputError
from attntune.measure.buffers import as_array, numpy_dtype
from attntune.measure.threads import load_runtime
from attntune.runtime.artifact import ALIGNMENT, LIBRARY, WEIGHTS, Artifact, map_weights, open_artifact
from attntune.runtime.buckets import Bucket, Piece, Planner, buckets_of
from attntune.runtime.kernel_thread import KERNEL_THREAD, device_tensors
from attntune.target import Target

_CPU = 1  # kDLCPU
_POOLED = 2


def load(path: str | Path, *, cores: int | None = None) -> TunedModel:
    """Load an artifact that :meth:`Artifact.save` wrote. Needs TVM's runtime library, not its compiler.

    Args:
        path: the artifact's folder.
        cores: threads to run with; by default as many as it was compiled for, or as this process may use if fewer.

    Raises:
        ArtifactError: see :func:`attntune.runtime.artifact.open_artifact`.
    """
    return TunedModel(open_artifact(path), cores=cores)


class TunedModel:
    """A compiled model, loaded.

    Calling it runs the entry ``forward``; :meth:`run` runs any entry by name. Inputs go by keyword, with symbolic
    dimensions of any size up to the longest compiled shape; the batch is cut into, and sequences padded to, compiled
    shapes. Calls may come from many threads; they run one after another, each on all cores.
    """

    def __init__(self, artifact: Artifact, *, cores: int | None = None) -> None:
        self.manifest = artifact.manifest
        self.folder = artifact.folder
        self.target = Target.from_json(self.manifest["target"])
        self.cores = cores or self.target.cores
        self._planners = {
            entry: Planner(buckets_of(self.manifest["buckets"], entry)) for entry in self.manifest["entries"]
        }
        arrays = map_weights(self.folder / WEIGHTS, self.manifest["weights"])
        KERNEL_THREAD.run(self.cores, lambda: self._load(arrays))

    def _load(self, arrays: Mapping[str, np.ndarray]) -> None:
        tvm_ffi = load_runtime()
        self._arrays = arrays
        names = {name for entry in self.manifest["entries"].values() for name in entry["weights"]}
        tensors = {name: device_tensors([arrays[name]])[0] for name in names}
        self._weights = {
            name: [tensors[weight] for weight in entry["weights"]] for name, entry in self.manifest["entries"].items()
        }
        library = tvm_ffi.load_module(str((self.folder / LIBRARY).resolve()))
        self._machine = library["vm_load_executable"]()
        self._machine["vm_initialization"](_CPU, 0, _POOLED)
        self._functions: dict[str, tuple[Any, list[Padded | None]]] = {}

    @property
    def entries(self) -> tuple[str, ...]:
        """Names that :meth:`run` takes."""
        return tuple(self.manifest["entries"])

    def __call__(self, **inputs: Any) -> Any:
        """Run ``forward``; see :meth:`run`."""
        return self.run("forward", **inputs)

    def run(self, entry: str, /, **inputs: Any) -> Any:
        """Run an entry point.

        Args:
            entry: one of :attr:`entries`.
            inputs: arrays by name, NumPy or torch (CPU); the dtypes and ranks the manifest gives (any integer dtype
                where it says int64).

        Returns:
            The entry's output, as NumPy or, when any input is a torch tensor, as torch, sharing memory with the
            kernel's result; a tuple of them for entries with several outputs.

        Raises:
            InputError: naming the input that is missing, unknown, of the wrong dtype or rank, of a size that
                contradicts another's, out of range, or too long.
        """
        signature, planner = self.require(entry), self._planners[entry]
        torch_out = any(type(value).__module__.split(".")[0] == "torch" for value in inputs.values())
        arrays, dims = check_inputs(signature["inputs"], inputs, self.manifest["name"])
        if _carries(signature):
            fixed = _carried_sizes(signature["inputs"], arrays, dims, self.manifest["name"])
            pieces: tuple[Piece, ...] = (Piece(0, dims["batch"], planner.choose(dims, fixed)),)
        else:
            pieces = planner.plan(dims)
        results = KERNEL_THREAD.run(self.cores, lambda: self._run(entry, signature, arrays, dims, pieces))
        if torch_out:
            import torch

            results = [torch.from_numpy(result) for result in results]
        return results[0] if len(results) == 1 else tuple(results)

    def state(self, entry: str, batch: int = 1, **dims: int) -> dict[str, np.ndarray]:
        """What a sequence of calls of ``entry`` starts from: zeros for each input that it updates.

        Args:
            entry: one of :attr:`entries`.
            batch: rows the calls will have at most.
            dims: least sizes of other dimensions, such as ``context``, the capacity of a cache.

        Returns:
            Arrays by input name, of a compiled shape, to pass to :meth:`run` again and again.

        Raises:
            InputError: no compiled shape is that large.
        """
        signature = self.require(entry)
        bucket = self._planners[entry].choose({"batch": batch, **dims})
        return {
            spec["name"]: aligned_zeros(_bucket_shape(spec, bucket), numpy_dtype(spec["dtype"]))
            for spec in signature["inputs"]
            if spec["name"] in signature.get("updates", {})
        }

    def require(self, entry: str) -> Mapping[str, Any]:
        """The manifest's inputs and outputs of an entry.

        Raises:
            InputError: the artifact has no such entry; it says whether the model has.
        """
        if entry not in self.entries:
            advice = f"expected one of {sorted(self.entries)}"
            if entry in self.manifest.get("left_out", ()):
                asked = ",".join([*self.entries, entry])
                advice = f"compiled only with entries {sorted(self.entries)}; compile it with --entries {asked}"
            raise InputError(f"{self.manifest['name']}: unknown entry {entry!r}: {advice}")
        found: Mapping[str, Any] = self.manifest["entries"][entry]
        return found

    def _run(
        self,
        entry: str,
        signature: Mapping[str, Any],
        arrays: list[np.ndarray | None],
        dims: Mapping[str, int],
        pieces: tuple[Piece, ...],
    ) -> list[np.ndarray]:
        parts = []
        for piece in pieces:
            function, padded = self._function(piece.bucket, signature["inputs"])
            tensors = [
                _fit(array, spec, piece, dims, buffer)
                for array, spec, buffer in zip(arrays, signature["inputs"], padded, strict=True)
            ]
            out = function(*tensors, *self._weights[entry])
            outputs = [out] if len(signature["outputs"]) == 1 else list(out)
            parts.append([as_array(output) for output in outputs])
        results = []
        for index, spec in enumerate(signature["outputs"]):
            first = parts[0][index]
            if spec.get("carried"):
                results.append(first)
                continue
            shape = tuple(dims[dim] if isinstance(dim, str) else dim for dim in spec["dims"])
            if len(parts) == 1 and first.shape == shape:
                results.append(first)
                continue
            whole = np.empty(shape, first.dtype)
            for piece, part in zip(pieces, parts, strict=True):
                inside = tuple(
                    slice(0, piece.stop - piece.start) if dim == "batch" else slice(0, size)
                    for dim, size in zip(spec["dims"], shape, strict=True)
                )
                whole[piece.start : piece.stop] = part[index][inside]
            results.append(whole)
        return results

    def _function(self, bucket: Bucket, specs: list[Mapping[str, Any]]) -> tuple[Any, list[Padded | None]]:
        """The bucket's function, and a buffer for each of its inputs, kept from call to call."""
        found = self._functions.get(bucket.function)
        if found is None:
            padded = [
                None if spec.get("carried") else Padded.zeros(_bucket_shape(spec, bucket), numpy_dtype(spec["dtype"]))
                for spec in specs
            ]
            found = self._functions[bucket.function] = (self._machine[bucket.function], padded)
        return found


@dataclass(frozen=True)
class Padded:
    """An aligned array as large as a bucket's input, and the tensor over its memory."""

    array: np.ndarray
    tensor: Any

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Padded:
        """A new one."""
        array = aligned_zeros(shape, dtype)
        return cls(array, device_tensors([array])[0])


def _bucket_shape(spec: Mapping[str, Any], bucket: Bucket) -> tuple[int, ...]:
    return tuple(bucket[dim] if isinstance(dim, str) else int(dim) for dim in spec["dims"])


def _carries(signature: Mapping[str, Any]) -> bool:
    """Whether an entry takes or gives what is carried from call to call; such a batch is not cut into pieces."""
    return any(spec.get("carried") for spec in (*signature["inputs"], *signature["outputs"]))


def _carried_sizes(
    specs: list[Mapping[str, Any]], arrays: list[np.ndarray | None], dims: Mapping[str, int], model: str
) -> dict[str, int]:
    """The sizes that carried inputs prescribe for the bucket."""
    sizes: dict[str, int] = {}
    for spec, array in zip(specs, arrays, strict=True):
        if not spec.get("carried") or array is None:
            continue
        for axis, dim in enumerate(spec["dims"]):
            expected = sizes.setdefault(dim, array.shape[axis]) if isinstance(dim, str) else dim
            if array.shape[axis] != expected or array.shape[axis] < dims.get(dim, 0):
                raise InputError(
                    f"{model}: input {spec['name']!r} has shape {array.shape}; expected {_signature(spec)} as "
                    f"state() or an entry gave it, with {dim} {max(expected, dims.get(dim, 0))}"
                )
    return sizes


def check_inputs(
    specs: list[Mapping[str, Any]], inputs: Mapping[str, Any], model: str
) -> tuple[list[np.ndarray | None], dict[str, int]]:
    """Inputs as NumPy arrays in the order of ``specs`` (None where left out), and the sizes of symbolic dimensions.

    Raises:
        InputError: see :meth:`TunedModel.run`.
    """
    names = [spec["name"] for spec in specs]
    if unknown := sorted(set(inputs) - set(names)):
        raise InputError(f"{model}: unknown inputs {unknown}; expected {names}")
    dims: dict[str, int] = {}
    arrays: list[np.ndarray | None] = []
    for spec in specs:
        name = spec["name"]
        value = inputs.get(name)
        if value is None:
            if not spec["optional"]:
                raise InputError(f"{model}: missing input {name!r}; expected {_signature(spec)}")
            arrays.append(None)
            continue
        array = _as_numpy(value, name)
        wanted = numpy_dtype(spec["dtype"])
        fits = np.issubdtype(array.dtype, np.integer) if wanted.kind == "i" else array.dtype == wanted
        if wanted.kind == "i" and array.dtype == np.bool_:
            fits = True
        if not fits:
            raise InputError(f"{model}: input {name!r} has dtype {array.dtype}; expected {_signature(spec)}")
        if array.ndim != len(spec["dims"]):
            raise InputError(f"{model}: input {name!r} has shape {array.shape}; expected {_signature(spec)}")
        for axis, dim in () if spec.get("carried") else enumerate(spec["dims"]):
            size = array.shape[axis]
            expected = dims.setdefault(dim, size) if isinstance(dim, str) else dim
            if size != expected:
                raise InputError(
                    f"{model}: input {name!r} has shape {array.shape}; expected axis {axis} ({dim}) to be {expected}"
                )
            if size == 0:
                raise InputError(f"{model}: input {name!r} has shape {array.shape}; expected no empty axis")
        if spec["upper"] is not None and (int(array.min()) < 0 or int(array.max()) >= spec["upper"]):
            raise InputError(
                f"{model}: input {name!r} holds values from {array.min()} to {array.max()}; "
                f"expected them in [0, {spec['upper']})"
            )
        arrays.append(array.astype(wanted, copy=False))
    return arrays, dims


def _signature(spec: Mapping[str, Any]) -> str:
    return f"{spec['dtype']} ({', '.join(map(str, spec['dims']))})"


def _as_numpy(value: Any, name: str) -> np.ndarray:
    if type(value).__module__.split(".")[0] == "torch":
        if value.device.type != "cpu":
            raise InputError(f"input {name!r} is on {value.device}; expected a CPU tensor")
        return np.asarray(value.detach().numpy())
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (list, tuple)):
        try:
            return np.asarray(value)
        except ValueError:
            raise InputError(f"input {name!r} is ragged; expected rows of equal length") from None
    raise InputError(f"input {name!r} is a {type(value).__name__}; expected a NumPy array or a torch tensor")


def _fit(
    array: np.ndarray | None, spec: Mapping[str, Any], piece: Piece, dims: Mapping[str, int], padded: Padded | None
) -> Any:
    """The rows of ``piece`` as a tensor of its bucket's shape.

    Read in place when they have that shape, lie contiguously at a multiple of 64 bytes, and may be exported (DLPack
    refuses read-only memory); else copied into ``padded``, with zeros past them.
    """
    if padded is None:
        assert array is not None
        return _carried(array, spec)
    rows = array if array is None or spec["dims"][0] != "batch" else array[piece.start : piece.stop]
    whole = padded.array.shape
    if rows is not None and rows.shape == whole:
        if rows.ctypes.data % ALIGNMENT == 0 and rows.flags.c_contiguous and rows.flags.writeable:
            return device_tensors([rows])[0]
        np.copyto(padded.array, rows)
        return padded.tensor
    inside = tuple(
        slice(piece.stop - piece.start if dim == "batch" else dims[dim] if isinstance(dim, str) else dim)
        for dim in spec["dims"]
    )
    padded.array.fill(0)
    padded.array[inside] = spec["fill"] if rows is None else rows
    return padded.tensor


def _carried(array: np.ndarray, spec: Mapping[str, Any]) -> Any:
    """A carried array as a tensor, read, and perhaps updated, where it is."""
    if array.ctypes.data % ALIGNMENT or not array.flags.c_contiguous or not array.flags.writeable:
        raise InputError(
            f"input {spec['name']!r} is not a contiguous, writable array at a multiple of {ALIGNMENT} bytes; "
            "expected what state() or an entry gave"
        )
    return device_tensors([array])[0]


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros whose first element lies at a multiple of 64 bytes, as vector loads want."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
