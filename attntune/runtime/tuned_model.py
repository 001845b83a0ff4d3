"""Run a compiled model: NumPy in and out, torch in and out, from any thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attntune.errors import InputError
from attntune.runtime.artifact import LIBRARY, WEIGHTS, Artifact, map_weights, open_artifact
from attntune.runtime.buckets import Bucket, Piece, Planner, buckets_of
from attntune.runtime.carried import Carried
from attntune.runtime.devices import device_for
from attntune.runtime.inputs import bucket_shape, check_inputs, lengths_of
from attntune.target import Target

if TYPE_CHECKING:
    from attntune.runtime.generation import Generated


def load(path: str | Path, *, cores: int | None = None, device: int = 0) -> TunedModel:
    """Load an artifact that :meth:`Artifact.save` wrote. Needs TVM's runtime library, not its compiler.

    Args:
        path: the artifact's folder.
        cores: threads to run with; by default as many as it was compiled for, or as this process may use if fewer.
        device: index of the CUDA device, for an artifact that is for one.

    Raises:
        ArtifactError: see :func:`attntune.runtime.artifact.open_artifact`; for CUDA, that device cannot run it.
    """
    return TunedModel(open_artifact(path), cores=cores, device=device)


class TunedModel:
    """A compiled model, loaded.

    Calling it runs the entry ``forward``; :meth:`run` runs any entry by name. Inputs go by keyword, with symbolic
    dimensions of any size up to the longest compiled shape; the batch is cut into, and sequences padded to, compiled
    shapes. Where an entry's ragged twin is compiled too (``forward_ragged`` beside ``forward``), padding at the right
    is not computed, neither the caller's nor that; output rows of it are then zero. Calls may come from many threads;
    they run one after another, each on all cores.

    On CUDA, NumPy arrays and CPU tensors are copied to the device and results back. Tensors on the device are read in
    place (any library's, by DLPack), and their values are not checked; where some are torch's, kernels are queued on
    torch's current stream and results are torch tensors on the device, which may not be computed yet.
    """

    def __init__(self, artifact: Artifact, *, cores: int | None = None, device: int = 0) -> None:
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
        self._device = device_for(self.manifest, f"{self.manifest['name']} in {self.folder}", self.cores, device)
        self._device.run(lambda: self._load(arrays), {})

    def _load(self, arrays: Mapping[str, np.ndarray]) -> None:
        # Read by the CPU where they are mapped, for as long as the model lives.
        self._arrays = arrays if self.target.kind == "cpu" else {}
        names = {name for entry in self.manifest["entries"].values() for name in entry["weights"]}
        tensors = {name: self._device.constant(arrays[name]) for name in names}
        self._weights = {
            name: [tensors[weight] for weight in entry["weights"]] for name, entry in self.manifest["entries"].items()
        }
        library = self._device.library((self.folder / LIBRARY).resolve())
        self._machine = library["vm_load_executable"]()
        self._machine["vm_initialization"](*self._device.vm)
        self._states: dict[str, Carried] = {}
        self._functions: dict[str, tuple[Any, list[Any]]] = {}

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
            inputs: arrays by name, NumPy or torch (on the CPU; for CUDA also on the device); the dtypes and ranks the
                manifest gives (any integer dtype where it says int64).

        Returns:
            The entry's output, as NumPy or, when any input is a torch tensor, as torch, sharing memory with the
            kernel's result; a tuple of them for entries with several outputs.

        Raises:
            InputError: naming the input that is missing, unknown, of the wrong dtype or rank, of a size that
                contradicts another's, out of range, or too long.
        """
        signature, planner = self.require(entry), self._planners[entry]
        form = self._device.form(inputs)
        arrays, dims = check_inputs(signature["inputs"], inputs, self.manifest["name"], self._device.read)
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
        results = self._device.run(
            lambda: self._run(entry, signature, arrays, dims, pieces, carried, form), inputs
        )  # fmt: skip
        return results[0] if len(results) == 1 else tuple(results)

    def state(self, entry: str, batch: int = 1, **dims: int) -> dict[str, Any]:
        """What a sequence of calls of ``entry`` starts from: zeros for each input that it updates.

        Args:
            entry: one of :attr:`entries`.
            batch: rows the calls will have at most.
            dims: least sizes of other dimensions, such as ``context``, the capacity of a cache.

        Returns:
            Arrays by input name (on CUDA tensors of the device), of a compiled shape, to pass to :meth:`run` again and
            again.

        Raises:
            InputError: no compiled shape is that large.
        """
        signature = self.require(entry)
        bucket = self._planners[entry].choose({"batch": batch, **dims})
        return {
            spec["name"]: self._device.zeros(bucket_shape(spec, bucket), spec["dtype"])
            for spec in signature["inputs"]
            if spec["name"] in signature.get("updates", {})
        }

    def permute(self, state: Any, parents: np.ndarray) -> None:
        """Let the first rows of a state on a device be copies of its rows ``parents``, (rows,) int64.

        For beam search; the state comes to the host and back.
        """
        self._device.permute(state, parents)

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
        arrays: list[Any],
        dims: Mapping[str, int],
        pieces: tuple[Piece, ...],
    ) -> tuple[str, list[Any]]:
        """The entry that skips padding, and its inputs, where there is some and all of it is at the right."""
        mask = arrays[[spec["name"] for spec in signature["inputs"]].index("attention_mask")]
        lengths = lengths_of(mask, dims) if mask is None or isinstance(mask, np.ndarray) else None
        computed = sum(piece.bucket["batch"] * piece.bucket["seq"] for piece in pieces)
        if lengths is None or int(lengths.sum()) == computed:
            return entry, arrays
        return signature["ragged"], [*arrays, lengths]

    def _carried(self, entry: str, signature: Mapping[str, Any], inputs: Mapping[str, Any]) -> Carried:
        specs = [spec for spec in signature["inputs"] if spec.get("carried")]
        arrays = [inputs[spec["name"]] for spec in specs]
        found = self._states.get(entry)
        if found is None or not found.holds(arrays):
            found = self._states[entry] = Carried.of(specs, arrays, self.manifest["name"], self._device.carried)
        return found

    def _run(
        self,
        entry: str,
        signature: Mapping[str, Any],
        arrays: list[Any],
        dims: Mapping[str, int],
        pieces: tuple[Piece, ...],
        carried: Carried | None,
        form: str,
    ) -> list[Any]:
        parts = []
        for piece in pieces:
            function, buffers = self._function(piece.bucket, signature["inputs"])
            states = iter(carried.tensors if carried else ())
            tensors = [
                next(states) if buffer is None else self._device.fit(array, spec, piece, dims, buffer)
                for array, spec, buffer in zip(arrays, signature["inputs"], buffers, strict=True)
            ]
            out = function(*tensors, *self._weights[entry])
            parts.append([out] if len(signature["outputs"]) == 1 else list(out))
        return [
            self._device.kept(parts[0][index], form)
            if spec.get("carried")
            else self._device.results([part[index] for part in parts], pieces, spec, dims, form)
            for index, spec in enumerate(signature["outputs"])
        ]

    def _function(self, bucket: Bucket, specs: list[Mapping[str, Any]]) -> tuple[Any, list[Any]]:
        """The bucket's function, and a buffer for each of its inputs, kept from call to call."""
        found = self._functions.get(bucket.function)
        if found is None:
            buffers = [
                None if spec.get("carried") else self._device.buffer(bucket_shape(spec, bucket), spec["dtype"])
                for spec in specs
            ]
            found = self._functions[bucket.function] = (self._machine[bucket.function], buffers)
        return found
