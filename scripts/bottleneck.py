"""Two claims about attention as curves: it removes the fixed context's bottleneck, and self-attention parallelises.

Trains three small encoder-decoders in PyTorch to reverse sequences of symbols: a GRU with one fixed context vector, a
GRU with additive attention, and a Transformer. Each is then tuned and compiled with attntune; accuracy (of tokens
written greedily) and latency (of reading the source, and of writing each token) are measured against length.

What reading gains from a second thread is measured apart, on encoders of equal width with seeded weights, which need no
training: --only scaling measures and replaces just that part, for the widths of --widths.

Results: OUT/bottleneck.json and the plots beside it; the tables of scaling go into OUT/README.md, between their marks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from bottleneck_models import LONGEST, STOP, SYMBOLS, batch, config, model, seeded_weights, train

import attntune
from attntune.engines.scaling import scaling
from attntune.measure.machine import versions
from attntune.report.benchmarks import update_page
from attntune.report.plots import BLUE, GREEN, ORANGE, picture, plain_log_axis
from attntune.report.scaling import plot_scaling, scaling_section
from attntune.target import Target

LENGTHS = (4, 8, 16, 24, 32, 40, 48)
SOURCES = (16, 32, 64, 128, 256)
#: (batch, source) of what threads bring: one sequence, and eight that do not depend on each other.
SCALING = (*((1, source) for source in (16, 32, 64, 128, 256, 512, 1024, 2048)), (8, 64), (8, 512))
WIDTHS = (64, 512)
KINDS = {"fixed": "GRU, fixed context", "additive": "GRU, additive attention", "transformer": "Transformer"}
#: Batches by kind, in multiples of --steps: a Transformer is longer on its plateau.
STEPS = {"fixed": 1, "additive": 1, "transformer": 2}


def source_inputs(source):
    """Inputs of the entry encode."""
    return {"input_ids": source, "source_lengths": np.full(len(source), source.shape[1], np.int32)}


def accuracy(tuned, length, rows, seed):
    """Share of tokens right, and of sequences wholly right, written greedily."""
    source, target = batch(np.random.default_rng([seed, length]), rows, length)
    written = tuned.generate([[]] * rows, source=source_inputs(source), max_new_tokens=length + 1).tokens
    right = np.zeros((rows, length), bool)
    for row, tokens in enumerate(written):
        kept = np.array([token for token in tokens if token != STOP][:length])
        right[row, : len(kept)] = kept == target[row, : len(kept)]
    return float(right.mean()), float(right.all(1).mean())


def latencies(tuned, length, samples):
    """Milliseconds: of reading a source of ``length``, and of each token written after it."""
    source, _ = batch(np.random.default_rng(length), 1, length)
    inputs = source_inputs(source)
    read = []
    for _ in range(samples + 3):
        started = time.perf_counter()
        tuned.run("encode", **inputs)
        read.append(1e3 * (time.perf_counter() - started))
    found = [tuned.generate([[]], source=inputs, max_new_tokens=32, stop=()) for _ in range(4)][1:]
    written = [1e3 * one.decode_secs / max(one.decode_steps, 1) for one in found]
    return {"read_ms": read[3:], "token_ms": written}


def measure_scaling(given):
    """What threads bring to the entry encode of the three kinds, by width."""
    target = Target.parse("native")
    found = {}
    for width in given.widths:
        models = {}
        for kind in KINDS:
            c = config(kind, width, max(source for _, source in given.scaling))
            models[kind] = model(kind, seeded_weights(c, given.seed), c)
        found[str(width)] = scaling(
            models, "encode", [{"batch": b, "source": s} for b, s in given.scaling], target, (1, given.threads),
            rounds=given.rounds, turn_secs=0.1, most_calls=20, say=lambda line: print(line, flush=True),
            seconds=given.seconds, database=given.out / "bottleneck-tuning.jsonl",
        )  # fmt: skip
    return found


def plot_models(models, folder):
    """Accuracy against length, and latency against length, of the trained models."""
    lines = dict(zip(KINDS, (BLUE, ORANGE, GREEN), strict=True))
    with picture(folder / "bottleneck-accuracy.png", (6, 4)) as figure:
        axis = figure.subplots()
        for kind, colour in lines.items():
            rows = models[kind]["accuracy"]
            axis.plot([row["length"] for row in rows], [100 * row["tokens"] for row in rows], marker="o", color=colour,
                      label=KINDS[kind])  # fmt: skip
        axis.set(xlabel="sequence length", ylabel="tokens right, %", ylim=(0, 102), title="Reversing a sequence")
        axis.grid(visible=True, axis="y")
        axis.legend()
    with picture(folder / "bottleneck-latency.png", (10, 4)) as figure:
        axes = figure.subplots(1, 2)
        titles = {"read_ms": "Reading the source", "token_ms": "Writing one token"}
        for axis, (field, title) in zip(axes, titles.items(), strict=True):
            for kind, colour in lines.items():
                rows = models[kind]["latency"]
                axis.plot([row["length"] for row in rows], [statistics.median(row[field]) for row in rows], marker="o",
                          color=colour, label=KINDS[kind])  # fmt: skip
            axis.set(xlabel="source length", ylabel="ms (log scale)", title=title, xscale="log", yscale="log")
            axis.set_xticks(SOURCES, [str(source) for source in SOURCES])
            axis.minorticks_off()
            plain_log_axis(axis.yaxis)
            axis.grid(visible=True, axis="y")
        axes[0].legend()


def write_scaling(found, folder):
    """The tables into the folder's README, and the plot."""
    names = {width: f"Encoders {width} wide" for width in found}
    for width, document in found.items():
        section = scaling_section(document, KINDS, names[width])
        update_page(folder / "README.md", f"scaling {width}", section, by="scripts/bottleneck")
    plot_scaling({names[width]: document for width, document in found.items()}, KINDS, "source",
                 folder / "bottleneck-scaling.png", batch=1)  # fmt: skip


def learn(kind, given):
    """Trained weights by name, from the folder of weights where they are there already."""
    steps = given.steps * STEPS[kind]
    stored = given.weights / f"{kind}-{steps}-{given.seed}.npz" if given.weights else None
    if stored is not None and stored.is_file():
        return dict(np.load(stored))
    weights = train(kind, steps, given.rows, given.seed)
    if stored is not None:
        stored.parent.mkdir(parents=True, exist_ok=True)
        np.savez(stored, **weights)
    return weights


def measure(kind, weights, given):
    """Tune and compile the trained model; its accuracy and its latency at each length."""
    built = model(kind, weights)
    entries = [name for name in ("encode", "prefill", "decode") if name in built.entries]
    shapes = [{"batch": b, "source": s, "seq": 16, "context": 64} for b, s in
              [(64, LONGEST), *((1, s) for s in SOURCES)]]  # fmt: skip
    shapes = [{name: size for name, size in shape.items() if kind == "transformer" or name != "context"}
              for shape in shapes]  # fmt: skip
    database = given.out / "bottleneck-tuning.jsonl"
    if given.seconds:
        attntune.tune(built, seconds=given.seconds, database=database, shapes=shapes[1:])
    artifact = attntune.compile(built, shapes=shapes, entries=entries, database=database if given.seconds else None)
    path = artifact.save(given.weights / f"{kind}.attn" if given.weights else given.out / f"{kind}.attn")
    tuned = attntune.load(path)
    found = {
        "steps": given.steps * STEPS[kind],
        "parameters": int(sum(value.size for value in weights.values())),
        "accuracy": [
            dict(zip(("length", "tokens", "sequences"), (n, *accuracy(tuned, n, 64, given.seed)), strict=True))
            for n in LENGTHS
        ],
        "latency": [{"length": n, **latencies(tuned, n, 30)} for n in SOURCES],
    }
    for row in found["accuracy"]:
        print(f"{kind}: length {row['length']}: {100 * row['tokens']:.1f} % of tokens", flush=True)
    for row in found["latency"]:
        print(f"{kind}: source {row['length']}: {statistics.median(row['read_ms']):.3f} ms to read, "
              f"{statistics.median(row['token_ms']):.3f} ms a token", flush=True)  # fmt: skip
    return found


def shape(text):
    """``8x512`` → (8, 512)."""
    batch, _, source = text.partition("x")
    return int(batch), int(source)


def arguments(argv):
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/bottleneck"), help="folder of the results")
    parser.add_argument(
        "--steps", type=int, default=4000, help="batches a GRU is trained on; a Transformer twice as many"
    )
    parser.add_argument("--rows", type=int, default=64, help="sequences of a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, and those compared with one in scaling")
    parser.add_argument("--seconds", type=float, default=20.0, help="of tuning for each model; 0: default schedules")
    parser.add_argument("--weights", type=Path, help="folder of trained weights, kept there and used again")
    parser.add_argument("--only", choices=[*KINDS, "scaling"],
                        help="train this one into --weights and stop; or measure scaling alone")  # fmt: skip
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of the encoders of scaling")
    parser.add_argument("--scaling", type=shape, nargs="+", default=SCALING, help="shapes of scaling: 1x16 8x512 …")
    parser.add_argument("--rounds", type=int, default=7, help="of scaling")
    given = parser.parse_args(argv)
    if given.only in KINDS and not given.weights:
        parser.error(f"--only {given.only} needs --weights")
    return given


def main(argv=None):
    """Train, compile, measure, plot."""
    given = arguments(argv)
    torch.set_num_threads(given.threads)
    if given.only in KINDS:
        learn(given.only, given)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "bottleneck.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    if given.only is None:
        results |= {
            "task": "reverse", "symbols": SYMBOLS, "trained_up_to": LONGEST, "rows": given.rows, "seed": given.seed,
            "versions": dict(versions()), "models": {kind: measure(kind, learn(kind, given), given) for kind in KINDS},
        }  # fmt: skip
    results["scaling"] = {**results.get("scaling", {}), **measure_scaling(given)}
    path.write_text(json.dumps(results, indent=1))
    if "models" in results:
        plot_models(results["models"], given.out)
    write_scaling(results["scaling"], given.out)


if __name__ == "__main__":
    main()
