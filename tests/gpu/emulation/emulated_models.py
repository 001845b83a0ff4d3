"""Small models of every family, compiled for CUDA and run on the emulated device.

What a process calls here needs ``emulation`` first: ``install`` to compile, ``load_driver`` to run what is compiled.
"""

from __future__ import annotations

import sys
import threading

import numpy as np

import attntune
from attntune.engines.gpu_models import MODELS, ask, small_model
from attntune.runtime import load


def compile_model(name, target, path, **options):
    """Save an artifact; names of the templates that its kernels are by, and of operators by the generic one."""
    entries, shapes = MODELS[name]
    artifact = attntune.compile(small_model(name), target=target, shapes=shapes, entries=entries, **options)
    artifact.save(path)
    templates = {kernel["template"].rpartition(":")[2] for kernel in artifact.kernels}
    generic = {kernel["workload"]["op"] for kernel in artifact.kernels if "generic" in kernel["template"]}
    return templates, generic


def answers(path, name):
    """Arrays by what was asked, of a loaded artifact."""
    return ask(load(path), name)


def asked_by_many(path, name, threads):
    """Whether so many threads at once all get what one gets; and which compilers the process has loaded."""
    tuned = load(path)
    alone = ask(tuned, name)
    found = []

    def work():
        found.append(ask(tuned, name))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    same = [all(np.array_equal(each[key], alone[key]) for key in alone) for each in found]
    return len(same) == threads and all(same), [name for name in ("tvm", "torch") if name in sys.modules]


def compiled_when_loaded(path, name):
    """As :func:`answers`, of an artifact with source; the host's compiler stands for nvcc."""
    from attntune.templates import cuda_lowering, nvcc

    nvcc.compile_source = cuda_lowering.compile_source
    return answers(path, name)


def on_the_device(path):
    """Inputs that lie on the device: results with them and without; what a wrong dtype, and no state, are told."""
    from attntune.errors import InputError
    from attntune.runtime.cuda import CudaMemory

    tuned, memory = load(path), CudaMemory()
    ids = np.random.default_rng(5).integers(0, 50, (2, 8))
    as_they_are = tuned(input_ids=memory.upload(ids))
    padded = tuned(input_ids=memory.upload(ids[:, :5].astype(np.int32)))
    messages = []
    try:
        tuned(input_ids=memory.upload(ids.astype(np.float32)))
    except InputError as error:
        messages.append(str(error))
    pairs = [(as_they_are, tuned(input_ids=ids)), (padded, tuned(input_ids=ids[:, :5]))]
    return all(np.array_equal(a, b) for a, b in pairs), messages


def refuse_host_state(path):
    """What a caller is told who passes NumPy arrays for a cache on the device."""
    tuned = load(path)
    state = {name: np.zeros((2, 24, 16), np.float16) for name in tuned.state("decode", 2)}
    tuned.run("decode", input_ids=np.ones((2, 1), np.int64), lengths=np.ones(2, np.int32), **state)


def streams(path):
    """Streams on which the model's kernels were queued in turn, and those that waited for another."""
    from attntune.runtime import cuda

    memory = cuda.CudaMemory()
    queued, waited, behind = [], [], []
    wait, queue_behind = memory._wait, memory._queue_behind
    memory._wait = lambda device, stream: (waited.append(stream), wait(device, stream))
    memory._queue_behind = lambda device, *both: (behind.append(both), queue_behind(device, *both))
    current = memory._ffi.core._env_get_current_stream
    for stream in (0x10, 0x10, 0x20, 0):
        with memory.on(stream):
            queued.append(int(current(2, 0) or 0))
    memory.download(memory.upload(np.zeros(3, np.float32)))
    return queued, behind, waited, int(current(2, 0) or 0)


def compile_package(directory, target, path, shapes):
    """Save an artifact of a model that a package's folder holds; the names of the templates of its kernels."""
    artifact = attntune.compile(attntune.models.from_pretrained(directory), target=target, shapes=shapes)
    artifact.save(path)
    return {kernel["template"].rpartition(":")[2] for kernel in artifact.kernels}


def written(path, words):
    """Tokens of each word as a loaded RNN encoder-decoder writes them, and the logits of its first step."""
    from attntune.runtime.sequences import Sequences
    from attntune.runtime.vocabulary import Vocabulary

    tuned = load(path)
    ids, lengths = Vocabulary.load(tuned.folder / "vocabulary.json").encode(words)
    source = {"input_ids": ids, "source_lengths": lengths}
    told = tuned.generate([[]] * len(words), source=source, max_new_tokens=12)
    return told.tokens, Sequences(tuned, [[]] * len(words), source, 2).begin()
