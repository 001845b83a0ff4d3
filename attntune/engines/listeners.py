"""Engines that write down what they hear, with Whisper's weights in CTranslate2's format; greedy, one recording."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import numpy as np

from attntune.engines.writers import Engine, WriterSource, Written

#: Whisper's tokens before a transcript without timestamps, in English models.
_PROMPT = (50257, 50362)


class AttntuneListener(Engine):
    """A compiled artifact, by :func:`attntune.runtime.generation.generate`."""

    title: ClassVar[str] = "attntune"

    def load(self, source: WriterSource, threads: int) -> None:
        """Load the artifact of the engine's precision."""
        from attntune.runtime import load

        self._tuned = load(source.artifact(self.precision), cores=threads)

    def write(self, prompt: Any, count: int) -> Written:
        """Tokens of log-mel features (bins, frames) float32."""
        from attntune.runtime.generation import generate

        source = {"input_features": np.asarray(prompt, np.float32)[None]}
        start = time.perf_counter()
        self._tuned.run("encode", **source)
        encoded = time.perf_counter()
        tokens = generate(self._tuned, [[]], source=source, max_new_tokens=count).tokens[0]
        return Written(tuple(tokens), encoded - start, (time.perf_counter() - encoded,))


class AttntuneBFloat16Listener(AttntuneListener):
    """The same in bfloat16."""

    title: ClassVar[str] = "attntune bfloat16"
    precision: ClassVar[str] = "bfloat16"


class AttntuneInt8Listener(AttntuneListener):
    """The same with int8 weights."""

    title: ClassVar[str] = "attntune int8"
    precision: ClassVar[str] = "int8"


class AttntuneInt8Float32Listener(AttntuneListener):
    """float32 but for the same linear layers."""

    title: ClassVar[str] = "attntune int8_float32"
    precision: ClassVar[str] = "int8_float32"


class AttntuneInt4Listener(AttntuneListener):
    """float32 with weights of 4 and 8 bits."""

    title: ClassVar[str] = "attntune int4"
    precision: ClassVar[str] = "int4"


class AttntuneW4A8Listener(AttntuneListener):
    """The same with activations of 8 bits."""

    title: ClassVar[str] = "attntune w4a8"
    precision: ClassVar[str] = "w4a8"


class CTranslate2Listener(Engine):
    """CTranslate2 on the directory itself."""

    title: ClassVar[str] = "CTranslate2"
    package: ClassVar[str] = "ctranslate2"

    def load(self, source: WriterSource, threads: int) -> None:
        """Read the directory."""
        import ctranslate2

        self._view = ctranslate2.StorageView.from_array
        self._model = ctranslate2.models.Whisper(
            source.path, device="cpu", compute_type=self.precision, inter_threads=1, intra_threads=threads
        )

    def write(self, prompt: Any, count: int) -> Written:
        """Tokens of log-mel features (bins, frames) float32."""
        features = np.asarray(prompt, np.float32)[None]
        start = time.perf_counter()
        self._model.encode(self._view(features))
        encoded = time.perf_counter()
        found = self._model.generate(
            self._view(features), [list(_PROMPT)], beam_size=1, max_length=count + len(_PROMPT)
        )  # fmt: skip
        return Written(tuple(found[0].sequences_ids[0]), encoded - start, (time.perf_counter() - encoded,))


class CTranslate2Int8Listener(CTranslate2Listener):
    """The same with int8 weights."""

    title: ClassVar[str] = "CTranslate2 int8"
    precision: ClassVar[str] = "int8"


#: By name; those of attntune first.
LISTENERS: dict[str, type[Engine]] = {
    "attntune": AttntuneListener,
    "attntune-bf16": AttntuneBFloat16Listener,
    "attntune-int8": AttntuneInt8Listener,
    "attntune-int8-float32": AttntuneInt8Float32Listener,
    "attntune-int4": AttntuneInt4Listener,
    "attntune-w4a8": AttntuneW4A8Listener,
    "ctranslate2": CTranslate2Listener,
    "ctranslate2-int8": CTranslate2Int8Listener,
}
