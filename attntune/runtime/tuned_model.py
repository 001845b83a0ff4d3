"""Run a compiled model: NumPy in and out, torch in and out, from any thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attntune.errors import InputError
from attntune.measure.buffers import as_array, numpy_dtype
from attntune.measure.threads import load_runtime
from attntune.runtime.artifact import LIBRARY, WEIGHTS, Artifact, map_weights, open_artifact
from attntune.runtime.buckets import Bucket, Piece, Planner, buckets_of
from attntune.runtime.carried import Carried
from attntune.runtime.inputs import Padded, aligned_zeros, bucket_shape, check_inputs, fit, lengths_of
from attntune.runtime.kernel_thread import KERNEL_THREAD, device_tensors
from attntune.target import Target

if TYPE_CHECKING:
    from attntune.runtime.generation import Generated

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
    shapes. Where an entry's ragged twin is compiled too (``forward_ragged`` beside ``forward``), padding at the right
    is not computed, neither the caller's nor that; output rows of it are then zero. Calls may come from many threads;
    they run one after another, each on all cores.
    """

    def __init__(self, artifact: Artifact, *, cores: int | None = None) -> None:
        self.manifest = artifact.manifest
        self.folder = artifact.folder
        self.target = Target.from_json(self.manifest["target"])
        self.cores = cores or self.target.cores
        self._planners = {
            entry: Planner(buckets_of(self.manifest["buckets"], entry)) for entry in self.manifest["entries"]
        }
        arrays = map_weights(
            self.folder / WEIGHTS, self.manifest["weights"], huge=self.manifest.get("generation") is not None
        )
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
        self._states: dict[str, Carried] = {}
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
        carried = None
        if any(spec.get("carried") for spec in (*signature["inputs"], *signature["outputs"])):
            # Such a batch is not cut: its rows belong to one state.
            carried = self._carried(entry, signature, inputs)
            bucket = planner.choose(dims, carried.sizes)
            pieces: tuple[Piece, ...] = (Piece(0, dims.get("batch", 1), bucket),)
            dims = {**carried.sizes, **dims}
        else:
            pieces = planner.plan(dims)
            if signature.get("ragged") in self.entries:
                entry, arrays = self._without_padding(entry, signature, arrays, dims, pieces)
                signature, pieces = self.require(entry), self._planners[entry].plan(dims)
        results = KERNEL_THREAD.run(self.cores, lambda: self._run(entry, signature, arrays, dims, pieces, carried))
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
            spec["name"]: aligned_zeros(bucket_shape(spec, bucket), numpy_dtype(spec["dtype"]))
            for spec in signature["inputs"]
            if spec["name"] in signature.get("updates", {})
        }

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> Generated:
        """Write on from prompts of token ids; see :func:`attntune.runtime.generation.generate`."""
        from attntune.runtime.generation import generate

        return generate(self, prompts, **options)

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

    def _without_padding(
        self,
        entry: str,
        signature: Mapping[str, Any],
        arrays: list[np.ndarray | None],
        dims: Mapping[str, int],
        pieces: tuple[Piece, ...],
    ) -> tuple[str, list[np.ndarray | None]]:
        """The entry that skips padding, and its inputs, where there is some and all of it is at the right."""
        names = [spec["name"] for spec in signature["inputs"]]
        lengths = lengths_of(arrays[names.index("attention_mask")], dims)
        computed = sum(piece.bucket["batch"] * piece.bucket["seq"] for piece in pieces)
        if lengths is None or int(lengths.sum()) == computed:
            return entry, arrays
        return signature["ragged"], [*arrays, lengths]

    def _carried(self, entry: str, signature: Mapping[str, Any], inputs: Mapping[str, Any]) -> Carried:
        specs = [spec for spec in signature["inputs"] if spec.get("carried")]
        arrays = [inputs[spec["name"]] for spec in specs]
        found = self._states.get(entry)
        if found is None or not found.holds(arrays):
            found = self._states[entry] = Carried.of(specs, arrays, self.manifest["name"])
        return found

    def _run(
        self,
        entry: str,
        signature: Mapping[str, Any],
        arrays: list[np.ndarray | None],
        dims: Mapping[str, int],
        pieces: tuple[Piece, ...],
        carried: Carried | None,
    ) -> list[np.ndarray]:
        parts = []
        for piece in pieces:
            function, padded = self._function(piece.bucket, signature["inputs"])
            states = iter(carried.tensors if carried else ())
            tensors = [
                next(states) if buffer is None else fit(array, spec, piece, dims, buffer)
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
                None if spec.get("carried") else Padded.zeros(bucket_shape(spec, bucket), numpy_dtype(spec["dtype"]))
                for spec in specs
            ]
            found = self._functions[bucket.function] = (self._machine[bucket.function], padded)
        return found
