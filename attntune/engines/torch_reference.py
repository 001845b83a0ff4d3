"""Any model in PyTorch: one torch function per operator call, so that no model needs a twin written by hand.

It is the engine to compare with in eager mode, and an oracle independent of NumPy. A new operator adds one maker here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from attntune.engines.torch_attention import INSPECT, attention
from attntune.engines.torch_decoder import MAKERS as DECODER_MAKERS
from attntune.engines.torch_recurrent import MAKERS as RECURRENT_MAKERS
from attntune.errors import EngineError
from attntune.ops.mean_pool import NORM_FLOOR

if TYPE_CHECKING:
    from attntune.models.model import OpCall

#: Takes what a run shares between its calls (masks), then the operands.
Step = Callable[..., Any]
Maker = Callable[["OpCall"], Step]

#: Makers by operator name.
MAKERS: dict[str, Maker] = {"attention": attention, **DECODER_MAKERS, **RECURRENT_MAKERS}


def makes(op: str) -> Callable[[Maker], Maker]:
    """Register the decorated maker: from a call, the function that computes it."""

    def register(maker: Maker) -> Maker:
        MAKERS[op] = maker
        return maker

    return register


@makes("linear")
def _linear(call: OpCall) -> Step:
    from torch.nn import functional as F

    bias, residual = bool(call.attrs.get("bias")), bool(call.attrs.get("residual"))
    activation = _activation(call.attrs.get("activation", ""))
    gated, squeeze = bool(call.attrs.get("gated")), bool(call.attrs.get("squeeze"))
    ragged = bool(call.attrs.get("lengths"))

    def step(_: Any, x: Any, weight: Any, *rest: Any) -> Any:
        lengths = rest[-1] if ragged else None
        rest = rest[: len(rest) - ragged]
        y = F.linear(x, weight, rest[0] if bias else None)
        up = None
        if gated:
            y, up = y.chunk(2, -1)
        if activation is not None:
            y = activation(y)
        if up is not None:
            y = y * up
        if residual:
            y = y.add_(rest[-1])
        if lengths is not None:
            y = _zero_past_end(y, lengths)
        return y.squeeze(1) if squeeze else y

    return step


def _activation(name: str) -> Callable[[Any], Any] | None:
    from torch.nn import functional as F

    known: dict[str, Callable[[Any], Any] | None] = {
        "": None,
        "relu": F.relu_,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": lambda x: F.silu(x, inplace=True),
    }
    if name not in known:
        raise EngineError(f"activation {name!r} has no PyTorch twin; expected one of {sorted(known)}")
    return known[name]


@makes("layer_norm")
def _layer_norm(call: OpCall) -> Step:
    from torch.nn import functional as F

    eps, residual = float(call.attrs["eps"]), bool(call.attrs.get("residual"))
    ragged = bool(call.attrs.get("lengths"))

    def step(_: Any, x: Any, *rest: Any) -> Any:
        lengths = rest[-1] if ragged else None
        rest = rest[: len(rest) - ragged]
        if residual:
            x = x + rest[0]
        y = F.layer_norm(x, x.shape[-1:], rest[-2], rest[-1], eps)
        return y if lengths is None else _zero_past_end(y, lengths)

    return step


def _zero_past_end(y: Any, lengths: Any) -> Any:
    """Y (batch, seq, features) with zeros past lengths (batch,)."""
    import torch

    ended = torch.arange(y.shape[1], device=y.device) >= lengths[:, None]
    return y.masked_fill(ended[:, :, None], 0.0)


@makes("softmax")
def _softmax(call: OpCall) -> Step:
    return lambda _, x: x.softmax(-1)


@makes("embedding_norm")
def _embedding_norm(call: OpCall) -> Step:
    from torch.nn import functional as F

    eps = float(call.attrs["eps"])

    def step(_: Any, ids: Any, types: Any, word: Any, position: Any, kind: Any, weight: Any, bias: Any) -> Any:
        total = F.embedding(ids, word).add_(F.embedding(types, kind)).add_(position[: ids.shape[1]])
        return F.layer_norm(total, total.shape[-1:], weight, bias, eps)

    return step


@makes("mean_pool")
def _mean_pool(call: OpCall) -> Step:
    from torch.nn import functional as F

    floor, normalize = float(call.attrs.get("eps", 1e-9)), bool(call.attrs.get("normalize", True))

    def step(_: Any, x: Any, mask: Any) -> Any:
        keep = mask != 0
        mean = x.masked_fill(~keep[:, :, None], 0.0).sum(1) / keep.sum(1, keepdim=True).clamp_min(floor)
        return F.normalize(mean, dim=1, eps=NORM_FLOOR) if normalize else mean

    return step


@makes("patchify")
def _patchify(call: OpCall) -> Step:
    from torch.nn import functional as F

    patch = call.attrs["patch"]
    return lambda _, x: F.unfold(x, patch, stride=patch).transpose(1, 2)


@makes("unfold")
def _unfold(call: OpCall) -> Step:
    from torch.nn import functional as F

    kernel, stride, padding = (int(call.attrs[name]) for name in ("kernel", "stride", "padding"))
    axes = (0, 2, 1) if call.attrs["layout"] == "bcl" else (0, 1, 2)

    def step(_: Any, x: Any) -> Any:
        windows = F.pad(x.permute(axes), (0, 0, padding, padding)).unfold(1, kernel, stride)
        return windows.transpose(2, 3).flatten(2)

    return step


@makes("add_positions")
def _add_positions(call: OpCall) -> Step:
    return lambda _, x, position: x + position[: x.shape[1]]


@makes("prepend_token")
def _prepend_token(call: OpCall) -> Step:
    import torch

    def step(_: Any, x: Any, token: Any, position: Any) -> Any:
        return torch.cat([token.expand(x.shape[0], 1, -1), x], dim=1).add_(position)

    return step


@makes("select_rows")
def _select_rows(call: OpCall) -> Step:
    import torch

    if "row" in call.attrs:
        return lambda _, x: x[:, call.attrs["row"]]
    return lambda _, x, index: x[torch.arange(x.shape[0]), index.clamp(0, x.shape[1] - 1)]


class TorchModel:
    """One entry of a model as a sequence of torch calls with weights bound beforehand.

    Args:
        model: a :class:`~attntune.models.model.Model` or :class:`~attntune.engines.graph.ModelGraph`.
        entry: which of its entries.
        dtype: every floating-point weight is cast to it; ``"float64"`` makes an oracle.
        inspect: whether masks may be looked at to choose a faster path; not under torch.compile.

    Calling it takes and returns tensors by name. It holds no state between calls; caches that an entry updates in place
    are updated in place.
    """

    def __init__(self, model: Any, entry: str = "forward", dtype: str = "float32", inspect: bool = True) -> None:
        import torch

        spec = model.entries[entry]
        self._slot: dict[str, int] = {}
        for tensor in spec.inputs:
            self._add(tensor.name)
        #: Tensors by slot.
        self.weights: dict[int, Any] = {}
        self._steps: list[tuple[Step, tuple[int, ...], tuple[int, ...]]] = []
        for call in model.calls(entry):
            if call.op not in MAKERS:
                raise EngineError(f"operator {call.op!r} has no PyTorch twin; expected one of {sorted(MAKERS)}")
            for name in call.args:
                if name in model.weights and name not in self._slot:
                    self.weights[self._add(name)] = _tensor(model.weights[name], getattr(torch, dtype))
            sources = tuple(self._slot[name] for name in call.args)
            self._steps.append((MAKERS[call.op](call), sources, tuple(map(self._add, call.results))))
        self._inspect = inspect
        self._inputs = tuple(tensor.name for tensor in spec.inputs)
        self._outputs = tuple(tensor.name for tensor in spec.outputs)

    def _add(self, name: str) -> int:
        self._slot[name] = len(self._slot)
        return self._slot[name]

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        """Outputs by name, under the caller's grad mode."""
        return self.run(self.weights, inputs)

    def run(self, weights: Mapping[int, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name with the given weights by slot."""
        values: list[Any] = [None] * len(self._slot)
        for slot, weight in weights.items():
            values[slot] = weight
        for name in self._inputs:
            values[self._slot[name]] = inputs[name]
        shared: dict[Any, Any] = {INSPECT: self._inspect}
        for step, sources, targets in self._steps:
            result = step(shared, *[values[source] for source in sources])
            for target, value in zip(targets, (result,) if len(targets) == 1 else result, strict=True):
                values[target] = value
        return {name: values[self._slot[name]] for name in self._outputs}


def torch_module(twin: TorchModel) -> Any:
    """``twin`` as a ``torch.nn.Module``: compilers fold and repack only weights that a module owns."""
    import torch

    class TwinModule(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
        def __init__(self) -> None:
            super().__init__()
            self.slots = tuple(twin.weights)
            for slot, weight in twin.weights.items():
                frozen = torch.nn.Parameter(weight, requires_grad=False)
                self.register_parameter(f"weight_{slot}", frozen)

        def forward(self, **inputs: Any) -> dict[str, Any]:
            return twin.run({slot: getattr(self, f"weight_{slot}") for slot in self.slots}, inputs)

    return TwinModule().eval()


def _tensor(array: np.ndarray, dtype: Any) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        tensor = torch.from_numpy(np.ascontiguousarray(array).view(np.uint16).copy()).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(np.array(array))
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def torch_reference(
    model: Any, inputs: Mapping[str, np.ndarray], entry: str = "forward", dtype: str = "float64"
) -> dict[str, np.ndarray]:
    """Outputs of ``entry`` computed by PyTorch in ``dtype``, as NumPy arrays by name."""
    import torch

    floating = getattr(torch, dtype)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
    tensors = {n: t.to(floating) if t.is_floating_point() else t for n, t in tensors.items()}
    with torch.inference_mode():
        return {name: value.numpy() for name, value in TorchModel(model, entry, dtype)(**tensors).items()}
