"""Shapes of a model as users give them, and what they mean to each of its entries."""

import dataclasses

import pytest

from attntune.errors import InputError, ModelError
from attntune.models import bert, decoder, encoder_decoder, rnn, transformer
from attntune.models.shapes import by_name

TINY = dataclasses.replace(
    transformer.PRESETS["transformer-base"], vocab_size=40, source_vocab_size=40, hidden_size=32, heads=2,
    encoder_layers=1, decoder_layers=1, inner=48, source_positions=16, positions=20,
)  # fmt: skip
MODELS = {
    "transformer": lambda: transformer.random_model(TINY, "tiny"),
    "rnn": lambda: rnn.random_model(rnn.RNNConfig(11, 13, 6, 7, 5, 9, bidirectional=True, attention=True), "tiny"),
    "bert": lambda: bert.random_model(bert.BertConfig(50, 32, 1, 2, 64, 16, 2, "gelu", 1e-12), "tiny"),
}
DECODER = decoder.DecoderConfig(61, 32, 1, 4, 2, 8, 48, 40, "rms", 1e-5, "silu", True, rope="half")


def test_numbers_have_their_places():
    assert by_name((2, 128)) == {"batch": 2, "seq": 128}
    assert by_name([2, 64, 32]) == {"batch": 2, "source": 64, "target": 32}
    assert by_name({"batch": 2}) == {"batch": 2}
    for wrong in ((1,), (1, 2, 3, 4)):
        with pytest.raises(InputError, match=r"\(batch, seq\) or \(batch, source, target\), or sizes by name"):
            by_name(wrong)


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("transformer", {}, {
            "encode": [{"batch": 2, "source": 9}],
            "prefill": [{"batch": 2, "source": 9, "seq": n, "context": 18} for n in (1, 16)],
            "decode": [{"batch": 2, "source": 9, "context": 18}],
            "forward": [{"batch": 2, "source": 9, "seq": 18}],
            "attend": [{"batch": 2, "source": 9, "seq": 18}],
        }),
        ("transformer", {"seq": 3, "context": 20}, {
            "prefill": [{"batch": 2, "source": 9, "seq": 3, "context": 20}],
            "forward": [{"batch": 2, "source": 9, "seq": 3}],
        }),
        ("rnn", {}, {
            "encode": [{"batch": 2, "source": 9}],
            "decode": [{"batch": 2, "source": 9}],
            "attend": [{"batch": 2, "source": 9, "seq": 18}],
        }),
    ],
)  # fmt: skip
def test_a_target_is_what_each_entry_makes_of_it(kind, given, expected):
    model = MODELS[kind]()
    shape = model.named_shape({"batch": 2, "source": 9, "target": 18, **given})
    assert {entry: model.entry_shapes([shape], entry) for entry in expected} == expected


def test_without_shapes_of_its_own_a_target_is_read_one_by_one():
    model = encoder_decoder.build(TINY, {}, "tiny", family="transformer", generation=None, shapes=())
    (dims,) = model.entry_shapes([model.named_shape((1, 4, 7))], "prefill")
    assert dims == {"batch": 1, "source": 4, "context": 7, "seq": 1}


def test_a_short_target_is_read_at_once():
    shape = MODELS["transformer"]().entry_shapes([{"batch": 1, "source": 4, "target": 7}], "prefill")
    assert [dims["seq"] for dims in shape] == [1, 7]


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("transformer", (1, 8), r"expected values for \['source'\] of entry 'encode'.*source length x target length"),
        ("transformer", (1, 21), "expected seq between 1 and 20, got 21; give batch x source length x target length"),
        ("transformer", (1, 17, 8), "expected source between 1 and 16, got 17"),
        ("transformer", (1, 16, 21), "expected target between 1 and 20, got 21"),
        ("transformer", (0, 16, 20), "expected batch of at least 1, got 0"),
        ("transformer", {"batch": 1, "sorce": 8, "target": 8}, r"no dimensions \['sorce'\]: expected some of .*source"),
        ("rnn", (1, 8, 33), "expected target between 1 and 32, got 33"),
        ("bert", (1, 8, 8), r"no dimensions \['source', 'target'\]: expected some of \['batch', 'seq'\]"),
        ("bert", (1, 17), "expected seq between 1 and 16, got 17"),
    ],
)
def test_what_does_not_fit_is_named(kind, shape, message):
    model = MODELS[kind]()
    with pytest.raises(ModelError, match=message):
        list(model.workloads([model.named_shape(shape)], next(iter(model.entries))))


def test_a_decoder_has_one_length():
    model = decoder.build(DECODER, decoder.random_weights(DECODER), "tiny", family="llama")
    assert model.named_shape((1, 8)) == {"batch": 1, "seq": 8}
    with pytest.raises(ModelError, match=r"no dimensions \['target'\]"):
        model.named_shape({"batch": 1, "target": 8})
