"""Tune the layers of well-known models for one target, and write what won to schedules/, which attntune ships.

    scripts/tune_schedules --target native --seconds 60
    scripts/tune_schedules --target x86-64-v3,cores=2 --models bert-base gpt2 --precisions float32

Every model is tuned for the given seconds at each precision. Only one layer of it is described, which has every
workload of the whole, and no weights are needed. The journal keeps every trial: the same command goes on where it
stopped. Records that the file in schedules/ already holds stay unless a faster one of the same workload was found.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attntune.database.journal import Journal
from attntune.database.maintenance import winners
from attntune.errors import AttntuneError
from attntune.models import bert, decoder, encoder_decoder, gpt2, llama, vit, whisper
from attntune.models.model import Model
from attntune.models.precision import PRECISIONS, supported
from attntune.progress import TrialDone
from attntune.target import Target
from attntune.tuner import tune

ROOT = Path(__file__).resolve().parents[1]

_ENCODER = ["1x16", "1x32", "1x64", "1x128", "1x256", "1x512", "8x128"]
_DECODER = ["1x1", "1x16", "1x128", "1x512", "1x1024"]


@dataclass(frozen=True)
class Architecture:
    """A model by the fields of its Hugging Face ``config.json``, of one layer, and the shapes it is tuned for."""

    fields: Mapping[str, Any]
    build: Callable[[Mapping[str, Any]], Model]
    shapes: Sequence[Mapping[str, int]]


def described(model: Model) -> Model:
    """``model`` with weights of the right shapes that take no memory: tuning reads their shapes alone."""
    for name, parameter in model.make_module().named_parameters():
        shape = tuple(int(dim) for dim in parameter.shape)
        model.weights.setdefault(name, np.broadcast_to(np.float32(1), shape))
    return model


def _bert(fields: Mapping[str, Any]) -> Model:
    return described(bert.build(bert.BertConfig(**fields), {}, "bert"))


def _gpt2(fields: Mapping[str, Any]) -> Model:
    return described(decoder.build(gpt2.config_from_json(fields), {}, "gpt2", family="gpt2"))


def _llama(fields: Mapping[str, Any]) -> Model:
    config = llama.config_from_json({"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, **fields})
    return described(decoder.build(config, {}, "llama", family="llama"))


def _vit(fields: Mapping[str, Any]) -> Model:
    return described(vit.build(vit.VitConfig.from_json(fields), {}, "vit"))


def _whisper(fields: Mapping[str, Any]) -> Model:
    sizes = {
        "vocab_size": 51865, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 80, "max_source_positions": 1500,
        "max_target_positions": 448, "activation_function": "gelu",
    }  # fmt: skip
    heads, inner = fields["heads"], fields["inner"]
    sizes |= {"d_model": fields["d_model"], "encoder_attention_heads": heads, "decoder_attention_heads": heads}
    sizes |= {"encoder_ffn_dim": inner, "decoder_ffn_dim": inner}
    config = whisper.config_from_json(sizes)
    return described(encoder_decoder.build(config, {}, "whisper", family="whisper", generation=None, shapes=()))


def _shapes(texts: Sequence[str], **more: int) -> tuple[dict[str, int], ...]:
    pairs = (text.split("x") for text in texts)
    return tuple({"batch": int(batch), "seq": int(seq), **more} for batch, seq in pairs)


def _sizes(vocab: int, hidden: int, heads: int, kv_heads: int, inner: int, positions: int) -> dict[str, int]:
    return {
        "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": inner, "max_position_embeddings": positions,
    }  # fmt: skip


_BERT = {"num_hidden_layers": 1, "max_position_embeddings": 512, "type_vocab_size": 2, "vocab_size": 30522,
         "hidden_act": "gelu", "layer_norm_eps": 1e-12, "num_attention_heads": 12}  # fmt: skip

ARCHITECTURES = {
    "minilm-l6": Architecture(
        {**_BERT, "hidden_size": 384, "intermediate_size": 1536, "pooling": True}, _bert, _shapes([*_ENCODER, "32x64"])
    ),
    "bert-base": Architecture(
        {**_BERT, "hidden_size": 768, "intermediate_size": 3072, "pooling": True}, _bert, _shapes(_ENCODER)
    ),
    "gpt2": Architecture(
        {"vocab_size": 50257, "n_embd": 768, "n_layer": 1, "n_head": 12, "n_positions": 1024,
         "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
        _gpt2,
        _shapes(_DECODER, context=1024),
    ),
    "smollm2-135m": Architecture(
        _sizes(49152, 576, 9, 3, 1536, 8192), _llama,
        (*_shapes(_DECODER, context=1024), *_shapes(["1x1", "1x2048", "1x4096"], context=4096)),
    ),
    "smollm2-360m": Architecture(_sizes(49152, 960, 15, 5, 2560, 8192), _llama, _shapes(_DECODER[:4], context=1024)),
    "tinyllama-1.1b": Architecture(
        _sizes(32000, 2048, 32, 4, 5632, 4096), _llama, _shapes(["1x1", "1x16", "1x128", "1x512"], context=4096)
    ),
    "vit-base": Architecture(
        {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12, "intermediate_size": 3072,
         "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16, "num_channels": 3,
         "num_labels": 1000},
        _vit,
        ({"batch": 1}, {"batch": 8}),
    ),
    "whisper-tiny": Architecture(
        {"d_model": 384, "heads": 6, "inner": 1536}, _whisper, _shapes(["1x1", "1x4"], context=448)
    ),
    "whisper-base": Architecture(
        {"d_model": 512, "heads": 8, "inner": 2048}, _whisper, _shapes(["1x1", "1x4"], context=448)
    ),
}  # fmt: skip


def main() -> int:
    options = parse()
    try:
        target = Target.parse(options.target)
        schedules = options.schedules / f"{target.key().split('/')[1]}.jsonl"
        journal = options.journal or schedules.with_name(f"{schedules.stem}-tuning.jsonl")
        for precision in options.precisions:
            if supported(precision, target)[0] != precision:
                print(f"{target.key()} does not compute {precision}")
                continue
            for name in options.models:
                tuned(name, target, precision, options.seconds, journal, options.seed, options.operators)
    except AttntuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(f"{schedules}: {ship(schedules, journal)} records")
    return 0


def tuned(
    name: str, target: Target, precision: str, seconds: float, journal: Path, seed: int, operators: Sequence[str] | None
) -> None:
    """Tune one architecture, or its calls of some operators, into ``journal``."""
    architecture = ARCHITECTURES[name]
    summary = tune(
        architecture.build(architecture.fields), target=target, precision=precision, shapes=architecture.shapes,
        operators=operators, seconds=seconds, database=journal, seed=seed, on_event=_say_failures,
    )  # fmt: skip
    print(
        f"{name} {precision}: {len(summary.results)} workloads, {summary.trials} trials, {summary.elapsed_secs:.0f} s"
    )
    if summary.interrupted:
        raise KeyboardInterrupt


def _say_failures(event: Any) -> None:
    if isinstance(event, TrialDone) and event.record.status != "correct":
        print(f"  {event.record.status} {event.record.workload} {event.record.config}: {event.record.message[:200]}")


def ship(schedules: Path, journal: Path) -> int:
    """Write the winners of ``journal`` and of what ``schedules`` holds; the number of records.

    Workloads of which one config alone was measured are left out: nothing was searched, a default needs no record.
    """
    trials, configs = Journal(journal).load(), defaultdict(set)
    for record in trials:
        if record.status == "correct":
            configs[record.workload, record.target].add(record.config)
    searched = [record for record in trials if len(configs[record.workload, record.target]) > 1]
    best = winners([*(Journal(schedules).load() if schedules.exists() else ()), *searched])
    with tempfile.TemporaryDirectory(dir=schedules.parent) as folder:
        made = Path(folder) / schedules.name
        Journal(made).extend(best)
        made.replace(schedules)
    return len(best)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="native")
    parser.add_argument("--seconds", type=float, default=60, help="for each model and precision")
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--operators", nargs="+", help="tune no others, such as: attention linear")
    parser.add_argument("--schedules", type=Path, default=ROOT / "schedules", help="folder to write to")
    parser.add_argument("--journal", type=Path, help="of every trial; default: TARGET-tuning.jsonl in that folder")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
