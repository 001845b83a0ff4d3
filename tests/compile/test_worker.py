"""A worker process may die in any way; the caller is told how, and the next call works."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from attntune.errors import ScheduleError, WorkerError
from attntune.measure.worker import IsolatedProcess, RemoteError, WorkerDied, WorkerTimeout

HELPERS = str(Path(__file__).parents[1] / "helpers")
ROOT = str(Path(__file__).parents[2])


def worker(**options):
    return IsolatedProcess(plugin_paths=(HELPERS,), **options)


@pytest.fixture
def process():
    with worker() as started:
        yield started


def gone(pid, within_secs=10.0):
    """Whether the process ends in time; a zombie has ended."""
    deadline = time.monotonic() + within_secs
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_calls_return_results_from_one_lasting_process(process):
    assert process.call("broken_templates:echo", 1, "two", {"three": 3.0}) == (1, "two", {"three": 3.0})
    first = process.call("broken_templates:process_id")
    assert first == process.pid != os.getpid()
    assert process.call("broken_templates:process_id") == first


def test_large_arguments_and_results(process):
    data = os.urandom(8_000_000)
    assert process.call("broken_templates:echo", data, timeout_secs=60) == (data,)


def test_raised_errors(process):
    with pytest.raises(RemoteError, match="MemoryError") as caught:
        process.call("broken_templates:allocate", 1 << 62)
    assert caught.value.exception_type == "MemoryError"
    with pytest.raises(RemoteError, match="StrangeError: cannot be pickled") as caught:
        process.call("broken_templates:raise_strange_error")
    assert "raise_strange_error" in caught.value.remote_traceback
    with pytest.raises(ScheduleError, match="as itself"):
        process.call("broken_templates:raise_attntune_error")
    with pytest.raises(RemoteError, match="no_such"):
        process.call("broken_templates:no_such")
    with pytest.raises(RemoteError, match="ModuleNotFoundError"):
        process.call("no_such_module:f")
    with pytest.raises(RemoteError, match=r"[Pp]ickle"):
        process.call("broken_templates:unpicklable")
    assert process.call("broken_templates:echo", 1) == (1,)


def test_a_crash_is_named_and_the_next_call_works(process):
    with pytest.raises(WorkerDied, match="SIGSEGV") as caught:
        process.call("broken_templates:break_build", "build_segfault")
    assert caught.value.exit_code == -signal.SIGSEGV
    assert "about to build_segfault" in str(caught.value)
    with pytest.raises(WorkerDied, match="SIGABRT"):
        process.call("broken_templates:break_build", "build_abort")
    with pytest.raises(WorkerDied, match=r"exited with code 7.*\n?last words") as caught:
        process.call("broken_templates:print_and_exit", 7)
    assert "SIG" not in str(caught.value)
    assert process.call("broken_templates:echo", 2) == (2,)


def test_output_of_earlier_calls_is_not_blamed(process):
    with pytest.raises(RemoteError):
        process.call("broken_templates:break_build", "raise")
    with pytest.raises(WorkerDied) as caught:
        process.call("broken_templates:print_and_exit", 1)
    assert "about to raise" not in str(caught.value)


@pytest.mark.parametrize("mode", ["build_hang", "build_native_hang"])
def test_a_hang_is_ended(process, mode):
    process.call("broken_templates:echo")
    pid = process.pid
    with pytest.raises(WorkerTimeout, match=r"no answer in 0\.3 s"):
        process.call("broken_templates:break_build", mode, timeout_secs=0.3)
    assert gone(pid)
    assert process.call("broken_templates:echo", 3, timeout_secs=10) == (3,)


def test_memory_is_limited():
    with worker(memory_limit_bytes=2 << 30) as limited:
        assert limited.call("broken_templates:allocate", 1 << 20) == 1 << 20
        with pytest.raises(RemoteError, match="MemoryError"):
            limited.call("broken_templates:allocate", 3 << 30)
        assert limited.call("broken_templates:allocate", 1 << 20) == 1 << 20


def test_threads_environment_and_preload():
    with worker(threads=3, env={"SOME_SETTING": "x"}, preload=[("broken_templates:echo", 1, 2)]) as process:
        assert process.call("broken_templates:environment", "TVM_NUM_THREADS") == "3"
        assert process.call("broken_templates:environment", "OMP_NUM_THREADS") == "3"
        assert process.call("broken_templates:environment", "SOME_SETTING") == "x"
        assert process.call("broken_templates:environment", "TVM_FFI_DISABLE_TORCH_C_DLPACK") == "1"
    with (
        worker(preload=[("broken_templates:raise_strange_error",)]) as process,
        pytest.raises(WorkerError, match="could not start: StrangeError"),
    ):
        process.call("broken_templates:echo")


def test_threads_take_turns(process):
    results = {}

    def work(i):
        results[i] = [process.call("broken_templates:echo", i, j) for j in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [(i, j) for j in range(20)] for i in range(4)}


def test_the_child_outlives_the_thread_that_started_it(process):
    pids = []
    thread = threading.Thread(target=lambda: pids.append(process.call("broken_templates:process_id")))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert process.call("broken_templates:process_id") == pids[0]


def test_kill_from_another_thread_ends_a_call(process):
    process.call("broken_templates:echo")
    threading.Timer(0.2, process.kill).start()
    with pytest.raises(WorkerDied, match="SIGKILL"):
        process.call("broken_templates:sleep", 100)
    assert process.call("broken_templates:echo", 4) == (4,)


def test_close_and_collection_leave_no_process():
    process = worker()
    process.start()
    pid = process.pid
    process.close()
    assert gone(pid)
    forgotten = worker()
    forgotten.call("broken_templates:echo")
    pid = forgotten.pid
    del forgotten
    assert gone(pid)


SCRIPT = """
import sys
from attntune.measure.worker import IsolatedProcess
process = IsolatedProcess(plugin_paths=(sys.argv[1],))
print(process.call("broken_templates:process_id"), flush=True)
print(process.call(*sys.argv[2:]) if sys.argv[2:] else process.call("broken_templates:echo", 5), flush=True)
"""


def start_script(tmp_path, *arguments):
    """A user's script, without a main guard, in a folder of its own."""
    script = tmp_path / "user_script.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": ROOT}
    return subprocess.Popen(
        [sys.executable, str(script), HELPERS, *arguments], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=env
    )


def test_a_script_without_a_main_guard(tmp_path):
    script = start_script(tmp_path)
    out, _ = script.communicate(timeout=60)
    assert script.returncode == 0
    assert len(out.split("\n")) == 3
    assert out.endswith("(5,)\n")


@pytest.mark.parametrize("mode", ["build_hang", "build_native_hang"])
def test_no_orphan_after_the_parent_is_killed(tmp_path, mode):
    script = start_script(tmp_path, "broken_templates:break_build", mode)
    child = int(script.stdout.readline())
    assert psutil.pid_exists(child)
    time.sleep(0.3)
    script.send_signal(signal.SIGKILL)
    script.wait()
    script.stdout.close()
    assert gone(child)


def test_what_a_child_started_in_a_session_of_its_own_ends_with_it(process):
    with pytest.raises(RemoteError):  # the answer, a Popen, cannot be pickled; the process runs all the same
        process.call("subprocess:Popen", ["sleep", "600"], start_new_session=True)
    (offspring,) = psutil.Process(process.pid).children()
    process.kill()
    assert gone(offspring.pid)
