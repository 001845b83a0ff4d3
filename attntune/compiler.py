"""Model and database to artifact: bind shapes, raise to workloads, pick schedules, pack weights, lower, build."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import CompileError
from attntune.models.model import Model, bind
from attntune.models.precision import at_precision, fitting
from attntune.models.shapes import Shape
from attntune.ops import TensorSpec, Workload
from attntune.runtime.artifact import LIBRARY, WEIGHTS, Artifact, seal, write_weights
from attntune.runtime.cuda import CODES
from attntune.runtime.vocabulary import VOCABULARY
from attntune.target import Target

#: What a call costs beside its arithmetic, in floating-point operations: about 0.2 ms of a small machine. Keeps the
#: runtime from cutting a batch into more calls than pay.
_CALL_COST_FLOPS = 4e7

_BATCHES = (1, 2, 4, 8)
_LENGTHS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)


@dataclass(frozen=True)
class Kernel:
    """One scheduled workload of an artifact."""

    name: str
    workload: Workload
    template: str
    choice: Any
    """:class:`attntune.database.query.Choice`."""

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        record = self.choice.record
        return {
            "name": self.name,
            "workload": json.loads(self.workload.key()),
            "template": self.template,
            "config": self.choice.config.to_json(),
            "source": self.choice.source,
            "from": self.choice.from_,
            "median_secs": record.median_secs if record is not None and self.choice.source == "exact" else None,
        }


def compile(
    model: Model,
    *,
    target: str | Target = "native",
    database: Any = None,
    shapes: Sequence[Shape] | None = None,
    entries: Sequence[str] | None = None,
    precision: str = "float32",
    cuda_code: str = "cubin",
    on_progress: Callable[[str], None] | None = None,
) -> Artifact:
    """Compile a model with the best schedules known.

    Args:
        model: from :func:`attntune.models.from_pretrained`.
        target: see :meth:`Target.parse`.
        database: journal path or paths, or a :class:`attntune.database.query.Database`; shipped schedules are used
            after it, and analytic defaults where nothing is known.
        shapes: the buckets to compile: (batch, seq), of an encoder-decoder (batch, source, target), or sizes by name,
            see :meth:`Model.named_shape`. By default those of the model's family, or batches 1, 2, 4 and 8 by lengths
            up to the model's.
        entries: entry points to compile; all by default.
        precision: one of :data:`attntune.models.precision.PRECISIONS`, see
            :func:`attntune.models.precision.at_precision`; inputs and outputs stay what they are. A target without the
            instructions, or a model without the kernels, gets another, and ``on_progress`` is told, or a
            :class:`PrecisionWarning` given.
        cuda_code: for CUDA, what the artifact carries: ``"cubin"``, for devices of the target's compute capability;
            ``"ptx"``, which the driver of newer ones assembles too; or ``"source"``, which takes nvcc to load.
        on_progress: called with a line at each stage.

    Raises:
        CompileError: when a shape cannot be compiled, naming the workload and config that failed.
    """
    target = Target.parse(target)
    if cuda_code not in CODES:
        raise CompileError(f"expected cuda_code to be one of {CODES}, got {cuda_code!r}")
    say = on_progress or (lambda line: None)
    model = at_precision(model, fitting(precision, target, on_progress, model))
    buckets = _shapes(model, shapes)
    chosen = tuple(entries or (name for name, entry in model.entries.items() if not entry.on_request))
    kernels = _choose(model, target, database, buckets, chosen)
    say(f"{len(kernels)} kernels for {len(buckets)} shapes on {target.key()}")

    folder = Path(tempfile.mkdtemp(prefix="attntune-"))
    try:
        packed = _pack_weights(model, target, kernels, chosen)
        module, rows = _lower(model, target, kernels, buckets, chosen)
        say("building")
        _build(module, target, folder / LIBRARY, kernels, cuda_code)
        index = write_weights(folder / WEIGHTS, packed)
        if model.tokenizer is not None:
            (folder / "tokenizer.json").write_text(model.tokenizer, encoding="utf-8")
        elif model.directory is not None:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                if (model.directory / name).is_file():
                    shutil.copyfile(model.directory / name, folder / name)
        if model.vocabulary is not None:
            (folder / VOCABULARY).write_text(json.dumps(model.vocabulary, ensure_ascii=False), encoding="utf-8")
        artifact = seal(folder, _manifest(model, target, kernels, rows, index, chosen, cuda_code))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(artifact, shutil.rmtree, str(folder), ignore_errors=True)
    return artifact


def default_shapes(model: Model) -> list[dict[str, int]]:
    """The buckets that are compiled when none are asked for."""
    if model.shapes:
        return [dict(shape) for shape in model.shapes]
    longest = model.max_lengths.get("seq", 512)
    lengths = [length for length in _LENGTHS if length < longest] + [longest]
    return [{"batch": batch, "seq": length} for batch in _BATCHES for length in lengths]


def _shapes(model: Model, shapes: Sequence[Shape] | None) -> list[dict[str, int]]:
    if shapes is None:
        return default_shapes(model)
    if not shapes:
        raise CompileError("expected at least one shape to compile")
    found = []
    for shape in shapes:
        dims = model.named_shape(shape)
        if dims not in found:
            found.append(dims)
    return found


def _choose(
    model: Model, target: Target, database: Any, buckets: Sequence[Mapping[str, int]], entries: Sequence[str]
) -> dict[Workload, Kernel]:
    """The schedule of every distinct workload."""
    from attntune.database.query import Database
    from attntune.templates import template_for

    if not isinstance(database, Database):
        paths = [] if database is None else [database] if isinstance(database, (str, Path)) else list(database)
        database = Database(paths)
    kernels: dict[Workload, Kernel] = {}
    for entry in entries:
        for workload in model.workloads(buckets, entry):
            if workload not in kernels:
                template = template_for(workload, target).reference_name()
                name = f"{workload.op}_{len(kernels)}"
                kernels[workload] = Kernel(name, workload, template, database.lookup(workload, target))
    return kernels


# -- weights -----------------------------------------------------------------------------------------------------------


def _packings(workload: Workload, target: Target) -> Mapping[str, Any]:
    from attntune.templates import template_for

    return template_for(workload, target).pack(workload, target)


def _pack_weights(
    model: Model, target: Target, kernels: Mapping[Workload, Kernel], entries: Iterable[str]
) -> dict[str, np.ndarray]:
    """Every weight once, in the layout its kernels read."""
    packed: dict[str, np.ndarray] = {}
    names = _first_names(model)
    for entry in entries:
        dims = dict.fromkeys(model.entry(entry).dims(), 1)
        for call in model.calls(entry):
            workload = call.workload(dims, frozenset(model.weights))
            packings = _packings(workload, target)
            for name, spec in zip(call.args, workload.inputs(), strict=True):
                if name not in model.weights:
                    continue
                packing = packings.get(spec.name)
                key = _packed_name(names[name], spec, packing)
                if key not in packed:
                    packed[key] = model.weights[name] if packing is None else packing.apply(model.weights[name])
    return packed


def _packed_name(name: str, spec: TensorSpec, packing: Any) -> str:
    """A weight read in two layouts is stored twice, under two names."""
    return name if packing is None else f"{name}:{'x'.join(map(str, packing.spec.shape))}"


def _first_names(model: Model) -> dict[str, str]:
    """Name of a weight → the first name of its array: what is tied is stored once, if it is read in one layout."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(values), name) for name, values in model.weights.items()}


# -- lowering ----------------------------------------------------------------------------------------------------------


def _lower(
    model: Model,
    target: Target,
    kernels: Mapping[Workload, Kernel],
    buckets: Sequence[Mapping[str, int]],
    entries: Sequence[str],
) -> tuple[Any, list[dict[str, Any]]]:
    """A Relax module with one function per entry and bucket, calling scheduled kernels; and the manifest's rows."""
    from tvm import relax

    from attntune.templates import load_template

    builder = relax.BlockBuilder()
    variables = {}
    for kernel in kernels.values():
        template = load_template(kernel.template)
        try:
            scheduled = template.schedule(kernel.workload, target, kernel.choice.config)
        except Exception as error:
            raise CompileError(
                f"cannot schedule {kernel.workload} with {kernel.choice.config} ({kernel.choice.source}): {error}"
            ) from error
        function = scheduled["main"].without_attr("global_symbol")
        variables[kernel.workload] = builder.add_func(function, kernel.name)
    rows = []
    for entry in entries:
        for dims in model.entry_shapes(buckets, entry):
            name = entry + "".join(f"_{dim[0]}{size}" for dim, size in dims.items())
            flops = _emit_function(builder, name, model, entry, dims, target, variables)
            rows.append({"entry": entry, "dims": dict(dims), "function": name, "cost": flops + _CALL_COST_FLOPS})
    return builder.get(), rows


def _emit_function(
    builder: Any,
    name: str,
    model: Model,
    entry: str,
    dims: Mapping[str, int],
    target: Target,
    variables: Mapping[Workload, Any],
) -> float:
    """Emit one entry at one shape; returns its floating-point operations."""
    from tvm import relax

    signature = model.entry(entry)
    calls = model.calls(entry)
    constants = frozenset(model.weights)
    parameters: dict[str, Any] = {}
    for given in signature.inputs:
        parameters[given.name] = relax.Var(given.name, relax.TensorType(bind(given.dims, dims), given.dtype))
    for key, (shape, dtype) in _weight_parameters(model, entry, target).items():
        parameters[key] = relax.Var(_identifier(key), relax.TensorType(shape, dtype))
    values = dict(parameters)
    names = _first_names(model)
    flops = 0.0
    with builder.function(name, list(parameters.values())):
        with builder.dataflow():
            for call in calls:
                workload = call.workload(dims, constants)
                flops += workload.flops()
                packings = _packings(workload, target)
                args = []
                for arg, spec in zip(call.args, workload.inputs(), strict=True):
                    if arg in constants:
                        args.append(values[_packed_name(names[arg], spec, packings.get(spec.name))])
                    else:
                        args.append(_shaped(builder, values[arg], spec.shape))
                values.update(zip(call.results, _emit_call(builder, variables[workload], workload, args), strict=True))
            finals = [_shaped(builder, values[spec.name], bind(spec.dims, dims)) for spec in signature.outputs]
            output = builder.emit_output(finals[0] if len(finals) == 1 else relax.Tuple(finals))
        builder.emit_func_output(output)
    return flops


def _emit_call(builder: Any, variable: Any, workload: Workload, args: list[Any]) -> list[Any]:
    """Emit a kernel's call; returns its results, of which the updated ones are the arguments themselves."""
    from tvm import relax

    types = [relax.TensorType(spec.shape, spec.dtype) for spec in workload.outputs()]
    if workload.updated:
        names = [spec.name for spec in workload.inputs()]
        places = [-1] * len(workload.fresh()) + [names.index(name) for name in workload.updated]
        call = relax.op.call_tir_inplace(variable, args, places, types)
    else:
        call = relax.call_tir(variable, args, types[0] if len(types) == 1 else types)
    result = builder.emit(call)
    if len(types) == 1:
        return [result]
    return [builder.emit(relax.TupleGetItem(result, index)) for index in range(len(types))]


def _weight_parameters(model: Model, entry: str, target: Target) -> dict[str, tuple[tuple[int, ...], str]]:
    """Packed weights that ``entry`` reads: stored name → shape and dtype, in order of first use."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    names = _first_names(model)
    dims = dict.fromkeys(model.entry(entry).dims(), 1)
    for call in model.calls(entry):
        workload = call.workload(dims, frozenset(model.weights))
        packings = _packings(workload, target)
        for arg, spec in zip(call.args, workload.inputs(), strict=True):
            if arg in model.weights:
                packing = packings.get(spec.name)
                stored = spec if packing is None else packing.spec
                found[_packed_name(names[arg], spec, packing)] = (stored.shape, stored.dtype)
    return found


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _shaped(builder: Any, value: Any, shape: tuple[int, ...]) -> Any:
    """``value`` viewed with another shape; free at run time."""
    from tvm import relax

    if tuple(int(dim) for dim in value.ty.shape) == tuple(shape):
        return value
    return builder.emit(relax.op.reshape(value, shape))


def _build(module: Any, target: Target, path: Path, kernels: Mapping[Workload, Kernel], cuda_code: str) -> None:
    from attntune.templates import cuda_lowering, lowering

    if target.kind == "cuda" and cuda_code != "source" and not cuda_lowering.load_cuda_runtime():
        raise CompileError(
            f"expected TVM's CUDA runtime, to embed {cuda_code} for {target.key()}, and cannot load it; it needs "
            "libcudart.so.13 (the CUDA toolkit's) and, without NVIDIA's driver, a C compiler; or compile with "
            "cuda_code='source'"
        )
    try:
        lowering.export(module, target, path, code=cuda_code)
    except Exception as error:
        configs = ", ".join(str(kernel.workload) for kernel in list(kernels.values())[:3])
        raise CompileError(
            f"building {len(kernels)} kernels ({configs}, …) for {target.key()} failed: {error}"
        ) from error


# -- manifest ----------------------------------------------------------------------------------------------------------


def _manifest(
    model: Model,
    target: Target,
    kernels: Mapping[Workload, Kernel],
    rows: list[dict[str, Any]],
    weights: Mapping[str, Any],
    entries: Iterable[str],
    cuda_code: str,
) -> dict[str, Any]:
    from attntune import __version__
    from attntune.measure.machine import versions

    return {
        "name": model.name,
        "family": model.family,
        "precision": model.precision,
        "attntune": __version__,
        "versions": versions(),
        "target": target.to_json(),
        "config": dict(model.config),
        "generation": dataclasses.asdict(model.generation) if model.generation else None,
        "entries": {
            name: {
                "inputs": [dataclasses.asdict(spec) for spec in model.entry(name).inputs],
                "outputs": [dataclasses.asdict(spec) for spec in model.entry(name).outputs],
                "updates": dict(model.entry(name).updates),
                "ragged": model.entry(name).ragged,
                "weights": list(_weight_parameters(model, name, target)),
            }
            for name in entries
        },
        "left_out": [name for name in model.entries if name not in set(entries)],
        "buckets": rows,
        "kernels": [kernel.to_json() for kernel in kernels.values()],
        "weights": dict(weights),
        **({"cuda_code": cuda_code} if target.kind == "cuda" else {}),
    }
