"""The checkpoint of g2p-en: a GRU encoder-decoder from letters to phonemes, as an ``.npz`` file.

Source: Park, Kim, "g2pE" (https://github.com/Kyubyong/g2p), 2019. Phonemes are those of the CMU dictionary: ARPAbet
with stress marks on vowels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from attntune.errors import ModelError
from attntune.models import rnn
from attntune.models.model import Generation, Model

_GRAPHEMES = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
_PHONEMES = [
    "<pad>", "<unk>", "<s>", "</s>", "AA0", "AA1", "AA2", "AE0", "AE1", "AE2", "AH0", "AH1", "AH2", "AO0", "AO1",
    "AO2", "AW0", "AW1", "AW2", "AY0", "AY1", "AY2", "B", "CH", "D", "DH", "EH0", "EH1", "EH2", "ER0", "ER1", "ER2",
    "EY0", "EY1", "EY2", "F", "G", "HH", "IH0", "IH1", "IH2", "IY0", "IY1", "IY2", "JH", "K", "L", "M", "N", "NG",
    "OW0", "OW1", "OW2", "OY0", "OY1", "OY2", "P", "R", "S", "SH", "T", "TH", "UH0", "UH1", "UH2", "UW", "UW0",
    "UW1", "UW2", "V", "W", "Y", "Z", "ZH",
]  # fmt: skip
_START, _STOP, _END_OF_WORD = 2, 3, 2
_MOST_PHONEMES = 20

#: The checkpoint's arrays → ours.
_NAMES = {
    f"{part}_{theirs}": f"{ours}.{name}"
    for part, ours in (("enc", "encoder"), ("dec", "decoder"))
    for theirs, name in (
        ("emb", "embedding"),
        ("w_ih", "gru.input.weight"),
        ("b_ih", "gru.input.bias"),
        ("w_hh", "gru.recurrent_weight"),
        ("b_hh", "gru.recurrent_bias"),
    )
} | {"fc_w": "decoder.output.weight", "fc_b": "decoder.output.bias"}


def load(path: Path) -> Model:
    """Read ``checkpoint20.npz``.

    Raises:
        ModelError: the file is no ``.npz``, or naming the arrays that are missing, unknown or of another shape.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError) as error:
        raise ModelError(f"expected an .npz file of arrays at {path}: {error}") from None
    if set(arrays) != set(_NAMES):
        raise ModelError(
            f"{path}: expected the arrays of a g2p-en checkpoint; missing {sorted(set(_NAMES) - set(arrays))}, unknown "
            f"{sorted(set(arrays) - set(_NAMES))}"
        )
    config = rnn.RNNConfig(
        source_vocab=len(_GRAPHEMES),
        target_vocab=len(_PHONEMES),
        source_embedding=arrays["enc_emb"].shape[-1],
        target_embedding=arrays["dec_emb"].shape[-1],
        encoder_hidden=arrays["enc_w_hh"].shape[-1],
        hidden=arrays["dec_w_hh"].shape[-1],
    )
    vocabulary = {
        "source": {"tokens": _GRAPHEMES, "lowercase": True, "unknown": 1, "end": [_END_OF_WORD]},
        "target": {"tokens": _PHONEMES, "separator": " "},
    }
    generation = Generation("rnn", start=(_START,), stop=(_STOP,), max_length=1 + _MOST_PHONEMES)
    weights = {_NAMES[name]: values for name, values in arrays.items()}
    return rnn.build(config, weights, "g2p-en", generation=generation, vocabulary=vocabulary)
