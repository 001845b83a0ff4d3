"""Whatever a schedule does, it is recorded for what it did, and the trials after it are measured."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

HELPERS = Path(__file__).parents[1] / "helpers"
sys.path.insert(0, str(HELPERS))

from broken_templates import MODES, Broken, Double  # noqa: E402

from attntune.database.journal import Journal  # noqa: E402
from attntune.database.query import Database  # noqa: E402
from attntune.database.record import Status, TuningRecord  # noqa: E402
from attntune.errors import TargetError, TuningError  # noqa: E402
from attntune.measure.buffers import GuardedArray, as_tensor  # noqa: E402
from attntune.measure.evaluator import Operands, mismatch  # noqa: E402
from attntune.measure.runner import LocalRunner  # noqa: E402
from attntune.measure.threads import load_runtime  # noqa: E402
from attntune.measure.trial import MeasureOptions, Trial  # noqa: E402
from attntune.ops import Attention, Linear  # noqa: E402
from attntune.search.space import Config  # noqa: E402
from attntune.target import PRESETS, native  # noqa: E402
from attntune.templates import template_for  # noqa: E402

ROOT = Path(__file__).parents[2]
W = Double(1024)
TARGET = native()
OPTIONS = MeasureOptions(
    warmup_secs=0.001, min_sample_secs=0.0005, samples=4, build_timeout_secs=10.0, run_timeout_secs=6.0,
    memory_limit_bytes=4 << 30, plugin_paths=(str(HELPERS),),
)  # fmt: skip

EXPECTED = {
    "ok": (Status.CORRECT, ""),
    "slow": (Status.CORRECT, ""),
    "raise": (Status.BUILD_ERROR, r"ValueError: this schedule cannot be made \(File .*broken_templates.py"),
    "build_segfault": (Status.BUILD_ERROR, "SIGSEGV"),
    "build_hang": (Status.TIMEOUT, "building took more than 10 s"),
    "build_native_hang": (Status.TIMEOUT, "building took more than 10 s"),
    "build_memory": (Status.BUILD_ERROR, "MemoryError"),
    "build_abort": (Status.BUILD_ERROR, "SIGABRT"),
    "not_a_module": (Status.BUILD_ERROR, "Error"),
    "wrong": (Status.WRONG_RESULT, r"output 'y'\[0\]: expected .* 1024 of 1024 elements"),
    "nan": (Status.WRONG_RESULT, "got nan"),
    "unwritten": (Status.WRONG_RESULT, r"output 'y'\[512\]: expected .*, got nan; 512 of 1024"),
    "outside": (Status.WRONG_RESULT, "wrote outside the bounds of 'y'"),
    "input": (Status.WRONG_RESULT, "changed its input 'x'"),
    "segfault": (Status.RUN_ERROR, "SIGSEGV"),
    "abort": (Status.RUN_ERROR, "SIGABRT"),
    "exit": (Status.RUN_ERROR, "exited with code 3"),
    "hang": (Status.TIMEOUT, "running took more than 6 s"),
    "memory": (Status.RUN_ERROR, ""),
}


def trial(mode, **fields):
    return Trial(W, TARGET, Broken().reference_name(), Config.of(mode=mode), **fields)


@pytest.fixture(scope="module")
def runner():
    with LocalRunner(OPTIONS) as started:
        started.start()
        yield started


@pytest.fixture(scope="module")
def records(runner):
    """One trial of every mode in one run, good ones at both ends."""
    trials = [trial(mode, is_default=mode == "ok") for mode in (*MODES, "ok")]
    return list(runner.measure(trials))


def test_every_failure_is_recorded_for_what_it_is(records):
    assert set(EXPECTED) == set(MODES)
    assert [r.config["mode"] for r in records] == [*MODES, "ok"]
    wrong = {r.config["mode"]: (r.status, r.message) for r in records if r.status is not EXPECTED[r.config["mode"]][0]}
    assert not wrong


@pytest.mark.parametrize("mode", MODES)
def test_messages_say_what_happened(records, mode):
    import re

    record = next(r for r in records if r.config["mode"] == mode)
    assert re.search(EXPECTED[mode][1], record.message, re.DOTALL), record.message
    assert (record.message == "") == (record.status is Status.CORRECT)


def test_records_are_complete(records):
    for record in records:
        assert record.workload == W.key()
        assert record.target == TARGET.key()
        assert record.machine["cpu_model"]
        assert record.machine["versions"]["tvm"].startswith("0.27")
        assert record.machine["target"] == TARGET.to_json()
        assert record.time.endswith("+00:00")
        assert (record.rtol, record.atol) == W.tolerance()
        assert TuningRecord.from_json(record.to_json()) == record
    first = records[0]
    assert first.is_default
    assert len(first.run_secs) == OPTIONS.samples
    assert all(0 < secs < 1 for secs in first.run_secs)
    assert 0 < first.build_secs < OPTIONS.build_timeout_secs
    assert first.max_abs_error <= 1e-5
    assert records[MODES.index("wrong")].max_abs_error == pytest.approx(1e-3, rel=0.1)


def test_a_hopeless_candidate_is_timed_briefly(records):
    slow = records[MODES.index("slow")]
    assert slow.median_secs > 3 * records[0].median_secs
    assert len(slow.run_secs) == 2


def test_nothing_broken_is_dispatched(records, tmp_path):
    path = tmp_path / "t.jsonl"
    Journal(path).extend(records)
    database = Database(path, shipped=False)
    assert database.lookup(W, TARGET, Broken()).config == Config.of(mode="ok")
    broken = [r for r in records if r.status is not Status.CORRECT]
    choice = Database(broken, shipped=False).lookup(W, TARGET, Broken())
    assert (choice.config, choice.source) == (Config.of(mode="ok"), "default")
    assert len(database.measured(W, TARGET)) == len(MODES)


def test_race_is_interleaved_and_marked_final(runner, records):
    raced = runner.race([trial("slow"), trial("ok", is_default=True)], rounds=5)
    assert [r.config["mode"] for r in raced] == ["slow", "ok"]
    assert all(r.final and r.status is Status.CORRECT and len(r.run_secs) == 5 for r in raced)
    assert raced[0].time == raced[1].time
    assert [r.is_default for r in raced] == [False, True]


@pytest.mark.parametrize("broken", ["segfault", "input", "wrong", "raise"])
def test_race_goes_on_without_what_breaks(runner, broken):
    raced = runner.race([trial("ok"), trial(broken), trial("slow")], rounds=3)
    assert [r.status for r in raced] == [Status.CORRECT, EXPECTED[broken][0], Status.CORRECT]
    assert [len(r.run_secs) for r in raced] == [3, 0, 3]


def test_race_of_nothing(runner):
    assert runner.race([], rounds=3) == []
    (alone,) = runner.race([trial("segfault")], rounds=3)
    assert alone.status is Status.RUN_ERROR
    assert alone.final


def test_cold_cache_samples():
    with LocalRunner(replace(OPTIONS, cache="cold", samples=3, run_timeout_secs=30.0, builders=1)) as runner:
        (record,) = runner.measure([trial("ok")])
    assert record.status is Status.CORRECT
    assert record.cache == "cold"
    assert len(record.run_secs) == 3


def test_targets_this_machine_cannot_run(runner):
    with pytest.raises(TargetError, match="expected a CPU target"):
        list(runner.measure([replace(trial("ok"), target=PRESETS["sm_80"])]))
    foreign = replace(TARGET, features=(*TARGET.features, "amx-of-tomorrow"))
    with pytest.raises(TargetError, match="amx-of-tomorrow"):
        list(runner.measure([replace(trial("ok"), target=foreign)]))
    arm = PRESETS["aarch64-neon"] if TARGET.triple.startswith("x86") else PRESETS["znver4"]
    with pytest.raises(TargetError, match="this machine is"):
        list(runner.measure([replace(trial("ok"), target=arm)]))


def test_impossible_options_are_named():
    with pytest.raises(TuningError, match="'hot' or 'cold', got 'warm'"):
        MeasureOptions(cache="warm")
    with pytest.raises(TuningError, match="samples to be positive, got 0"):
        MeasureOptions(samples=0)


def test_close_leaves_no_process_and_no_files():
    # Nothing hangs here, so nothing but a stalled machine takes long.
    runner = LocalRunner(replace(OPTIONS, build_timeout_secs=60.0, run_timeout_secs=60.0))
    assert next(iter(runner.measure([trial("ok")]))).status is Status.CORRECT
    pids = [p.pid for p in psutil.Process().children(recursive=True)]
    mine = [process.pid for process in (*runner._builders, runner._timer) if process.pid]
    assert mine
    assert set(mine) <= set(pids)
    folder = runner._folder
    assert folder.exists()
    runner.close()
    assert not folder.exists()
    assert not any(psutil.pid_exists(pid) for pid in mine)


SCRIPT = """
import sys
sys.path[:0] = [{helpers!r}, {root!r}]
from broken_templates import Broken, Double
from attntune.measure.runner import LocalRunner
from attntune.measure.trial import MeasureOptions, Trial
from attntune.search.space import Config
from attntune.target import native
trial = Trial(Double(64), native(), Broken().reference_name(), Config.of(mode=sys.argv[1]))
runner = LocalRunner(MeasureOptions(samples=2, builders=1, plugin_paths=({helpers!r},), run_timeout_secs=1000))
runner.start()
print(runner._builders[0].pid, flush=True)
for record in runner.measure([Trial(trial.workload, trial.target, trial.template, Config.of(mode="ok")), trial]):
    print(record.status, runner._timer.pid, flush=True)
"""


def start_script(tmp_path, mode):
    script = tmp_path / "user.py"
    script.write_text(SCRIPT.format(helpers=str(HELPERS), root=str(ROOT)))
    return subprocess.Popen(
        [sys.executable, str(script), mode],
        stdout=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip


def test_a_script_without_a_main_guard_measures(tmp_path):
    script = start_script(tmp_path, "unwritten")
    out, _ = script.communicate(timeout=120)
    lines = out.split("\n")
    assert [line.split()[0] for line in lines[1:3]] == ["correct", "wrong_result"]
    assert script.returncode == 0


def test_no_orphan_when_the_parent_is_killed_while_a_kernel_hangs(tmp_path):
    script = start_script(tmp_path, "hang")
    builder = int(script.stdout.readline())
    status, timer = script.stdout.readline().split()
    assert status == "correct"
    time.sleep(1.0)
    children = [builder, int(timer)]
    assert all(psutil.pid_exists(pid) for pid in children)
    script.send_signal(signal.SIGKILL)
    script.wait()
    script.stdout.close()
    deadline = time.monotonic() + 10
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, children))


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_timing_process_imports_neither_compiler_nor_torch(runner, records):
    process = runner._timer
    assert not process.call("broken_templates:imported", "tvm")
    assert not process.call("broken_templates:imported", "torch")
    assert process.call("broken_templates:imported", "tvm_ffi")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot pin threads")
def test_every_thread_of_a_kernel_has_a_cpu_of_its_own(runner, records):
    masks = []
    for thread in psutil.Process(runner._timer.pid).threads():
        masks.append(os.sched_getaffinity(thread.id))
    single = [mask for mask in masks if len(mask) == 1]
    if len(os.sched_getaffinity(0)) > 1:
        assert len(single) >= TARGET.cores
        assert len(set().union(*single)) >= TARGET.cores


def test_mismatch():
    expected = np.array([1.0, 2.0, 0.0])
    assert mismatch("y", np.float32([1, 2, 0]), expected, 0.0, 0.0) == (0.0, 0.0, "")
    absolute, relative, problem = mismatch("y", np.float32([1, 2.5, 0]), expected, 0.1, 0.1)
    assert (absolute, relative) == (0.5, 0.25)
    assert problem.startswith("output 'y'[1]: expected 2, got 2.5; 1 of 3 elements")
    assert mismatch("y", np.float32([1, 2.3, 0]), expected, 0.1, 0.11)[2] == ""
    assert "got nan" in mismatch("y", np.float32([1, 2, np.nan]), expected, 1.0, 1.0)[2]
    infinite = np.array([np.inf, 1.0, 1.0])
    assert mismatch("y", infinite, infinite, 0.0, 0.0)[2] == ""
    assert "shape" in mismatch("y", np.zeros((3, 1)), expected, 1.0, 1.0)[2]


@pytest.mark.parametrize("dtype", ["float32", "int64", "bfloat16", "float16"])
def test_guarded_arrays(dtype):
    from attntune.ops.workload import as_dtype

    values = as_dtype(np.arange(15, dtype=np.float32).reshape(3, 5), dtype)
    guarded = GuardedArray.holding(values)
    assert guarded.array.ctypes.data % 64 == 0
    assert (guarded.array == values).all()
    tensor = as_tensor(guarded.array)
    assert (str(tensor.dtype), tuple(tensor.shape)) == (dtype, (3, 5))
    assert tensor.data_ptr() == guarded.array.ctypes.data
    assert guarded.guards_intact()
    assert guarded.is_unchanged()
    guarded._memory[guarded._end] = 0
    assert not guarded.guards_intact()
    guarded._memory[guarded._end] = 0xFF
    guarded._memory[guarded._start - 1] = 0
    assert not guarded.guards_intact()
    guarded.array[2, 4] = 0
    assert not guarded.is_unchanged()
    guarded.poison()
    assert (guarded.array == -1).all() if dtype == "int64" else np.isnan(guarded.array.astype(np.float32)).all()


def test_runtime_loads_once():
    assert load_runtime() is load_runtime()


@pytest.mark.parametrize(
    ("workload", "own"),
    [
        (Linear(1, 512, 1024), {"weight", "bias"}),
        (Linear(1, 32, 32), set()),
        (Attention(1, 6, 1, 1024, 64, kv_heads=2, causal=True, lengths="kv", kv_layout="bhsd"), {"key", "value"}),
        (Attention(1, 6, 4, 1500, 64), {"key", "value"}),
        (Attention(1, 6, 256, 256, 64), set()),
    ],
)
def test_what_layers_have_of_their_own_comes_from_memory(workload, own):
    """Its copies are met in turns, and are larger together than the last cache; the rest is one tensor."""
    template = template_for(workload, TARGET)
    trial = Trial(workload, TARGET, template.reference_name(), template.default(workload, TARGET))
    operands, met = Operands(trial, reference=False), []
    turn = operands.turns(lambda *tensors: met.append(tensors))
    for _ in operands.rotation:
        turn()
    apart = {}
    for name, *tensors in zip(operands.names, *met, strict=False):
        apart[name] = set(map(id, tensors))
    assert {name for name, places in apart.items() if len(places) == len(met) > 1} == own
    assert all(len(places) == 1 for name, places in apart.items() if name not in own)
    if own:
        size = sum(operands.inputs[operands.names.index(name)].array.nbytes for name in own)
        assert size * len(met) >= TARGET.l3_bytes
