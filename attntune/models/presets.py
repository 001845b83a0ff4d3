"""Models of well-known sizes with seeded weights, by name: for measuring speed, and where no checkpoint is at hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from attntune.errors import ModelError
from attntune.models import bert, decoder, gpt2, llama, transformer
from attntune.models.decoder import DecoderConfig
from attntune.models.model import Model

#: What stands before a preset's name where a model may be a path too.
PREFIX = "preset:"


def _decoder(config: DecoderConfig, name: str, seed: int, family: str) -> Model:
    return decoder.build(config, decoder.random_weights(config, seed), name, family=family)


#: From a seed to the model, by name.
PRESETS: dict[str, Callable[[int], Model]] = {
    **{name: partial(bert.random_model, config, name) for name, config in bert.PRESETS.items()},
    **{name: partial(transformer.random_model, config, name) for name, config in transformer.PRESETS.items()},
    **{name: partial(_decoder, config, name, family="llama") for name, config in llama.PRESETS.items()},
    **{name: partial(_decoder, config, name, family="gpt2") for name, config in gpt2.PRESETS.items()},
}


def preset(name: str, seed: int = 0) -> Model:
    """The model called ``name``, such as ``"transformer-base"``, with or without :data:`PREFIX`.

    Args:
        name: of a preset.
        seed: of its weights.

    Raises:
        ModelError: there is no such preset; it names those there are.
    """
    plain = name.removeprefix(PREFIX)
    if plain not in PRESETS:
        raise ModelError(f"unknown preset {plain!r}; expected one of {sorted(PRESETS)}")
    return PRESETS[plain](seed)
