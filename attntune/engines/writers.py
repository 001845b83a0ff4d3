"""Engines that write tokens with a decoder-only model, each meant for a process of its own; greedy, one sequence."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from attntune.engines.engine import OPENMP_ENV
from attntune.errors import EngineError
from attntune.host import host_features


@dataclass(frozen=True)
class WriterSource:
    """What a writer may need of the model."""

    path: str
    """The model's own files, such as a GGUF file or a directory."""
    artifacts: Mapping[str, str]
    """Precision → a compiled artifact."""
    context: int
    """Capacity of the cache, in tokens."""

    def artifact(self, precision: str) -> str:
        """The artifact of a precision; raises :class:`EngineError` where there is none."""
        if precision not in self.artifacts:
            raise EngineError(f"no artifact in {precision}; expected one of {sorted(self.artifacts)}")
        return self.artifacts[precision]


@dataclass(frozen=True)
class Written:
    """New tokens, and what they took."""

    tokens: tuple[int, ...]
    prefill_secs: float
    """From the prompt's ids to the first new token; of one that hears, of the encoder."""
    step_secs: tuple[float, ...]
    """Of each further token; of one that hears, of the whole."""


class Engine(ABC):
    """A model in memory that writes tokens greedily."""

    title: ClassVar[str]
    precision: ClassVar[str] = "float32"
    package: ClassVar[str] = ""
    env: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def unavailable(cls) -> str | None:
        """Why it cannot run here, or None."""
        missing = cls.package and find_spec(cls.package) is None
        return f"package {cls.package} is not installed" if missing else None

    @classmethod
    def shown(cls) -> str:
        """Its title, with what is unusual about it on this machine."""
        return cls.title

    @abstractmethod
    def load(self, source: WriterSource, threads: int) -> None:
        """Read the model."""

    @abstractmethod
    def write(self, prompt: Any, count: int) -> Written:
        """At most ``count`` tokens that follow ``prompt``."""


class Writer(Engine):
    """One that continues token ids, whatever the tokens: none ends it."""

    @abstractmethod
    def begin(self, prompt: Sequence[int]) -> int:
        """Forget what was, read the prompt, give the first new token."""

    @abstractmethod
    def step(self, token: int, length: int) -> int:
        """The token after ``token``, which is number ``length`` of the sequence, counted from 1."""

    def write(self, prompt: Sequence[int], count: int) -> Written:
        """Just ``count`` tokens."""
        start = time.perf_counter()
        tokens = [self.begin(prompt)]
        times = [time.perf_counter() - start]
        while len(tokens) < count:
            start = time.perf_counter()
            tokens.append(self.step(tokens[-1], len(prompt) + len(tokens)))
            times.append(time.perf_counter() - start)
        return Written(tuple(tokens), times[0], tuple(times[1:]))


class AttntuneWriter(Writer):
    """A compiled artifact: entries prefill, of one compiled length, and decode."""

    title: ClassVar[str] = "attntune"

    def load(self, source: WriterSource, threads: int) -> None:
        """Load the artifact of the writer's precision."""
        from attntune.runtime import load

        self._tuned = load(source.artifact(self.precision), cores=threads)
        self._state = self._tuned.state("decode", 1, context=source.context)

    def begin(self, prompt: Sequence[int]) -> int:
        """The whole prompt in one call."""
        ids, lengths = np.asarray(prompt)[None], np.array([len(prompt)], np.int32)
        last = np.array([len(prompt) - 1], np.int64)
        logits = self._tuned.run("prefill", input_ids=ids, lengths=lengths, last=last, **self._state)
        return int(logits[0].argmax())

    def step(self, token: int, length: int) -> int:
        """One call of decode."""
        ids, lengths = np.array([[token]]), np.array([length], np.int32)
        return int(self._tuned.run("decode", input_ids=ids, lengths=lengths, **self._state)[0].argmax())


class AttntuneBFloat16Writer(AttntuneWriter):
    """The same in bfloat16."""

    title: ClassVar[str] = "attntune bfloat16"
    precision: ClassVar[str] = "bfloat16"


class AttntuneInt8Writer(AttntuneWriter):
    """The same with int8 weights."""

    title: ClassVar[str] = "attntune int8"
    precision: ClassVar[str] = "int8"


class AttntuneInt8Float32Writer(AttntuneWriter):
    """float32 but for the same linear layers."""

    title: ClassVar[str] = "attntune int8_float32"
    precision: ClassVar[str] = "int8_float32"


class AttntuneInt4Writer(AttntuneWriter):
    """float32 with weights of 4 and 8 bits: of a GGUF file its own."""

    title: ClassVar[str] = "attntune int4"
    precision: ClassVar[str] = "int4"


class AttntuneW4A8Writer(AttntuneWriter):
    """The same with activations of 8 bits."""

    title: ClassVar[str] = "attntune w4a8"
    precision: ClassVar[str] = "w4a8"


class PyTorchWriter(Writer):
    """PyTorch eager: SDPA over a preallocated cache that is written in place."""

    title: ClassVar[str] = "PyTorch"
    package: ClassVar[str] = "torch"
    env: ClassVar[Mapping[str, str]] = OPENMP_ENV

    def load(self, source: WriterSource, threads: int) -> None:
        """The model's PyTorch twins, prefill and decode over the same weights."""
        import torch

        from attntune.engines.torch_reference import TorchModel
        from attntune.models import from_pretrained

        torch.set_num_threads(threads)
        model = from_pretrained(source.path)
        dtype = getattr(torch, self.precision)
        self._torch = torch
        self._prefill = TorchModel(model, "prefill", self.precision)
        self._decode = TorchModel(model, "decode", self.precision)
        width = {"batch": 1, "context": source.context}
        self._caches = {
            spec.name: torch.zeros([width[d] if isinstance(d, str) else d for d in spec.dims], dtype=dtype)
            for spec in model.entries["decode"].inputs
            if spec.carried
        }

    def begin(self, prompt: Sequence[int]) -> int:
        """The whole prompt in one call."""
        tensor = self._torch.tensor
        last = tensor([len(prompt) - 1])
        ids, lengths = tensor([list(prompt)]), tensor([len(prompt)], dtype=self._torch.int32)
        with self._torch.inference_mode():
            out = self._prefill(input_ids=ids, lengths=lengths, last=last, **self._filled(len(prompt)))
            return int(out["logits"][0].argmax())

    def step(self, token: int, length: int) -> int:
        """One call of decode."""
        tensor = self._torch.tensor
        ids, lengths = tensor([[token]]), tensor([length], dtype=self._torch.int32)
        with self._torch.inference_mode():
            out = self._decode(input_ids=ids, lengths=lengths, **self._filled(length))
            return int(out["logits"][0].argmax())

    def _filled(self, length: int) -> dict[str, Any]:
        """Views of the caches' part that is filled after the call: no time goes into keys that are not there."""
        return {name: cache[:, :length] for name, cache in self._caches.items()}


class PyTorchBFloat16Writer(PyTorchWriter):
    """The same in bfloat16."""

    title: ClassVar[str] = "PyTorch bfloat16"
    precision: ClassVar[str] = "bfloat16"


class LlamaCppWriter(Writer):
    """llama.cpp on the GGUF file itself, its weights as they are stored."""

    title: ClassVar[str] = "llama.cpp"
    precision: ClassVar[str] = "stored"
    package: ClassVar[str] = "llama_cpp"

    @classmethod
    def shown(cls) -> str:
        """See :meth:`load`."""
        return f"{cls.title} without AMX" if "amx-tile" in host_features() else cls.title

    def load(self, source: WriterSource, threads: int) -> None:
        """Read the file.

        Products by AMX end llama_cpp's process with an illegal instruction (0.3.36, Emerald Rapids); it goes without.
        """
        import llama_cpp
        from llama_cpp import Llama

        if "amx-tile" in host_features():
            defaults = llama_cpp.llama_cpp.llama_model_default_params

            def without_amx() -> Any:
                params = defaults()
                params.use_extra_bufts = False
                return params

            llama_cpp.llama_cpp.llama_model_default_params = without_amx
        self._model = Llama(
            source.path, n_ctx=source.context, n_batch=source.context, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip

    def begin(self, prompt: Sequence[int]) -> int:
        """The whole prompt in one batch."""
        self._model.reset()
        self._model.eval(list(prompt))
        return int(self._model.sample(temp=0.0))

    def step(self, token: int, length: int) -> int:
        """One evaluation."""
        self._model.eval([token])
        return int(self._model.sample(temp=0.0))


#: Writers by name; those of attntune first.
WRITERS: dict[str, type[Writer]] = {
    "attntune": AttntuneWriter,
    "attntune-bf16": AttntuneBFloat16Writer,
    "attntune-int8": AttntuneInt8Writer,
    "attntune-int8-float32": AttntuneInt8Float32Writer,
    "attntune-int4": AttntuneInt4Writer,
    "attntune-w4a8": AttntuneW4A8Writer,
    "pytorch": PyTorchWriter,
    "pytorch-bf16": PyTorchBFloat16Writer,
    "llama.cpp": LlamaCppWriter,
}
