"""Check every CUDA template on this machine's GPU, tune the benchmark shapes, compare with PyTorch.

    scripts/gpu_check --minutes 20 --results results/gpu-h100
    scripts/gpu_check --steps check,compare --only attention-bfloat16-128

Compared with: cuBLAS; SDPA's flash and cuDNN backends; FlexAttention (Triton's attention, as PyTorch writes it);
torch.compile on linear layers with all that follows them.

Steps: check (default configs against the float64 reference; without --only and --ops small whole models against the
CPU; the benchmark shapes also against PyTorch), tune, compare (interleaved, each engine in a process of its own). Stop
it at any time; the same command goes on where it was. Results: check-*.json, tuning.jsonl (a journal of schedules), one
file of raw samples for each part, README.md with the tables.
Exit codes: 0 success, 1 a kernel that is wrong or failed, 2 an error with a message, 130 an interrupt.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from attntune.engines.compare_kernels import KernelOptions
from attntune.engines.cuda_suites import parts
from attntune.engines.gpu_check import STEPS, GpuCheck, GpuSettings, failures
from attntune.errors import AttntuneError
from attntune.host import available_cpus
from attntune.measure.cuda_device import detect_cuda
from attntune.measure.cuda_runner import CudaRunner
from attntune.measure.trial import MeasureOptions
from attntune.report.gpu_check import write_page
from attntune.templates.nvcc import find_nvcc

CORNERS = Path(__file__).resolve().parents[1] / "tests" / "contract"


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever stops it, it ends in order
    sys.path.insert(0, str(CORNERS))
    from corners import on_cuda

    try:
        target, device = detect_cuda()
        find_nvcc()
        say(f"{device or 'a CUDA device'}: {target.key()}")
        chosen = [part for part in parts() if all(word in part.name for word in options.only.split())]
        measure = MeasureOptions(
            builders=min(options.builders, len(available_cpus())), plugin_paths=(str(CORNERS),), run_timeout_secs=120.0
        )
        corners = [w for w in on_cuda() if not options.ops or w.op in options.ops.split(",")]
        check = GpuCheck(GpuSettings(
            target, device, options.results, chosen, corners, lambda: CudaRunner(measure),
            KernelOptions(rounds=options.rounds, caches=("hot",)), say=say,
            **({"models": ()} if options.ops or options.only else {}),
        ))  # fmt: skip
        steps = {"check": check.check, "tune": lambda: check.tune(options.minutes), "compare": check.compare}
        wrong: dict[str, None] = {}
        for step in options.steps.split(","):
            for path in steps[step]():
                wrong.update(dict.fromkeys(f"{path.stem}: {line}" for line in failures(path)))
                write_page(options.results, list(dict.fromkeys(w.op for w in on_cuda())), [p.name for p in parts()])
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where this one stopped")
        return 130
    except AttntuneError as error:
        say(f"gpu_check: {error}")
        return 2
    for line in wrong:
        say(f"wrong: {line[:500]}")
    return 1 if wrong else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="of tuning, those of earlier runs counted (20)")
    parser.add_argument("--results", type=Path, default=Path("results/gpu"), help="where everything goes (%(default)s)")
    parser.add_argument("--steps", default=",".join(STEPS), help="in the order given (%(default)s)")
    parser.add_argument("--only", default="", help="only parts whose names hold all of these words")
    parser.add_argument("--ops", default="", help="only corner workloads of these operators; all by default")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds of each comparison (9)")
    parser.add_argument("--builders", type=int, default=8, help="kernels compiled at once (8)")
    options = parser.parse_args()
    if unknown := [step for step in options.steps.split(",") if step not in STEPS]:
        parser.error(f"unknown steps {unknown}; expected some of {', '.join(STEPS)}")
    if not [part for part in parts() if all(word in part.name for word in options.only.split())]:
        parser.error(f"no part has {options.only!r} in its name; there are {', '.join(part.name for part in parts())}")
    return options


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
