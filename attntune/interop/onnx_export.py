"""Write a model to ONNX: the twin that other engines run, and a check that it is the same model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attntune.errors import ExportError
from attntune.interop.onnx_graph import GraphBuilder, element_type
from attntune.interop.reference import next_name
from attntune.models.model import updated_in_place

if TYPE_CHECKING:
    from attntune.models.model import Model

#: Opset by style. 24 is the first whose ``Attention`` promises zeros for a query whose keys are all masked.
OPSETS = {"decomposed": 17, "standard": 24, "onnxruntime": 17}

#: IR version that goes with each opset.
_IR_VERSIONS = {17: 8, 24: 11}

#: A protobuf message must stay below 2 GiB; weights beyond this go into a file beside the model.
EXTERNAL_DATA_BYTES = 2**31 - 2**26


def export_onnx(
    model: Model,
    path: str | Path,
    *,
    attention: str = "decomposed",
    entry: str = "forward",
    metadata: Mapping[str, Any] | None = None,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
) -> Path:
    """Write one entry of ``model`` to an ONNX file whose batch and sequence axes are dynamic.

    Weights become initializers with their own names and layouts.

    Args:
        model: what to write; its calls are walked in order.
        path: of the ``.onnx`` file. Weights of more than ``external_data_bytes`` go to ``<path>.data`` beside it.
        attention: ``"decomposed"`` (opset 17: MatMul, Softmax, Erf, …), ``"standard"`` (opset 24: the ``Attention``
            and ``Gelu`` operators), or ``"onnxruntime"`` (opset 17 with ONNX Runtime's own ``MultiHeadAttention``,
            which only that engine runs; grouped-query attention stays decomposed).
        entry: which of the model's entries.
        metadata: JSON-ready tuning summary, kept in the file under ``attntune.tuning``; see :func:`tuning_metadata`.
        external_data_bytes: see ``path``.

    Returns:
        The path written. The file has passed ``onnx.checker.check_model(full_check=True)``.

    Raises:
        ExportError: an operator has no emitter, ``attention`` or ``entry`` is unknown, the result is not valid ONNX,
            or the ``onnx`` package is missing.
    """
    try:
        import onnx
    except ImportError:
        raise ExportError("writing ONNX needs the onnx package: pip install 'attntune[onnx]'") from None
    from attntune.interop.onnx_ops import emit

    if attention not in OPSETS:
        raise ExportError(f"unknown attention style {attention!r}; expected one of {sorted(OPSETS)}")
    if entry not in model.entries:
        raise ExportError(f"model {model.name!r} has no entry {entry!r}; expected one of {sorted(model.entries)}")
    path = Path(path)
    builder = GraphBuilder(OPSETS[attention], attention, model.weights)
    calls = model.calls(entry)
    for call in calls:
        emit(builder, call)
    proto = _model_proto(model, entry, builder)
    _annotate(proto, model, entry, attention, metadata)
    large = sum(array.nbytes for array in builder.initializers.values()) > external_data_bytes
    path.parent.mkdir(parents=True, exist_ok=True)
    data_path = path.with_name(path.name + ".data")
    # onnx appends to an existing data file; without this a second export would keep the first one's weights too.
    data_path.unlink(missing_ok=True)
    onnx.save_model(proto, path, save_as_external_data=large, location=data_path.name if large else None,
                    size_threshold=1024)  # fmt: skip
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported model {path} is not valid ONNX: {error}") from error
    return path


def _model_proto(model: Model, entry: str, builder: GraphBuilder) -> Any:
    from onnx import helper, numpy_helper

    def info(name: str, dims: tuple[int | str, ...], dtype: str) -> Any:
        return helper.make_tensor_value_info(name, element_type(dtype), list(dims))

    spec = model.entries[entry]
    outputs = [info(tensor.name, tensor.dims, tensor.dtype) for tensor in spec.outputs]
    shapes = {tensor.name: tensor for tensor in spec.inputs}
    for name, result in updated_in_place(model.calls(entry), spec, frozenset(model.weights)).items():
        builder.nodes.append(helper.make_node("Identity", [builder.value(result)], [next_name(name)]))
        outputs.append(info(next_name(name), shapes[name].dims, shapes[name].dtype))
    graph = helper.make_graph(
        builder.nodes,
        entry,
        [info(tensor.name, tensor.dims, tensor.dtype) for tensor in spec.inputs],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in builder.initializers.items()],
    )
    imports = [helper.make_opsetid("", builder.opset)]
    if any(node.domain == "com.microsoft" for node in builder.nodes):
        imports.append(helper.make_opsetid("com.microsoft", 1))
    return helper.make_model(graph, opset_imports=imports, ir_version=_IR_VERSIONS[builder.opset])


def _annotate(proto: Any, model: Model, entry: str, attention: str, metadata: Mapping[str, Any] | None) -> None:
    import attntune

    proto.producer_name = "attntune"
    proto.producer_version = attntune.__version__
    fields = {
        "attntune.version": attntune.__version__,
        "attntune.model": model.name,
        "attntune.entry": entry,
        "attntune.attention": attention,
    }
    if metadata is not None:
        fields["attntune.tuning"] = json.dumps(metadata, sort_keys=True, default=str)
    for key, value in fields.items():
        proto.metadata_props.add(key=key, value=value)


def tuning_metadata(target: str, choices: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The tuning summary that goes into a file's metadata.

    Args:
        target: :meth:`Target.key`.
        choices: workload key → ``config``, ``source`` (exact, transferred or default) and ``median_secs`` (or None).
    """
    kernels = [
        {
            "workload": workload,
            "config": dict(choice["config"]),
            "source": str(choice["source"]),
            "median_secs": choice.get("median_secs"),
        }
        for workload, choice in choices.items()
    ]
    return {"target": target, "kernels": kernels}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What :func:`export_onnx` noted in a file: version, model, entry, attention, and the tuning summary if any."""
    import onnx

    proto = onnx.load(str(path), load_external_data=False)
    fields: dict[str, Any] = {
        prop.key.removeprefix("attntune."): prop.value
        for prop in proto.metadata_props
        if prop.key.startswith("attntune.")
    }
    if "tuning" in fields:
        fields["tuning"] = json.loads(fields["tuning"])
    return fields
