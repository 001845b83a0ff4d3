"""Tiny models of every family, compiled for CUDA and run on the emulated device; the same questions for the CPU.

What a process calls here needs ``emulation`` first: ``install`` to compile, ``load_driver`` to run what is compiled.
"""

from __future__ import annotations

import dataclasses
import sys
import threading

import numpy as np

import attntune
from attntune.runtime import load

SHAPES = {
    "bert": [{"batch": 2, "seq": 8}],
    "llama": [{"batch": 2, "seq": 8, "context": 24}],
    "whisper": [{"batch": 2, "seq": 4, "context": 16}],
}
ENTRIES = {
    "bert": ["forward", "forward_ragged"],
    "llama": ["prefill", "decode"],
    "whisper": ["encode", "prefill", "decode"],
}
PROMPTS = {"llama": [[5, 6, 7, 8, 9, 11, 12, 30, 3, 4], [1, 2, 3]], "whisper": [[4, 5], [6, 7]]}


def model(name):
    """Seeded; sizes that tensor cores take."""
    if name == "bert":
        from attntune.models.bert import BertConfig, random_model

        return random_model(BertConfig(50, 32, 1, 2, 64, 16, 2, "gelu", 1e-12), "tiny bert")
    if name == "llama":
        from attntune.models import decoder, llama

        config = dataclasses.replace(
            llama.PRESETS["smollm2-135m"], vocab_size=40, hidden_size=32, num_layers=2, heads=2, kv_heads=1,
            head_dim=16, inner=48, positions=64,
        )  # fmt: skip
        return decoder.build(config, decoder.random_weights(config), "tiny llama", family="llama")
    from attntune.models import encoder_decoder
    from attntune.models.model import Generation

    config = encoder_decoder.EncoderDecoderConfig(
        vocab_size=40, hidden_size=32, heads=2, encoder_layers=1, decoder_layers=1, inner=64, source_positions=10,
        positions=16, mels=8, activation="gelu", norm_first=True,
    )  # fmt: skip
    generation = Generation("encoder-decoder", start=(1,), stop=(2,), max_length=16)
    weights = encoder_decoder.random_weights(config)
    return encoder_decoder.build(config, weights, "tiny whisper", family="whisper", generation=generation, shapes=())


def compile_model(name, target, path, **options):
    """Save an artifact; names of the templates that its kernels are by, and of operators by the generic one."""
    artifact = attntune.compile(model(name), target=target, shapes=SHAPES[name], entries=ENTRIES[name], **options)
    artifact.save(path)
    templates = {kernel["template"].rpartition(":")[2] for kernel in artifact.kernels}
    generic = {kernel["workload"]["op"] for kernel in artifact.kernels if "generic" in kernel["template"]}
    return templates, generic


def answers(path, name):
    """Arrays by what was asked, of a loaded artifact."""
    return ask(load(path), name)


def ask(tuned, name):
    """Arrays by what was asked."""
    rng = np.random.default_rng(3)
    if name == "bert":
        ids, mask = rng.integers(0, 50, (3, 7)), np.ones((3, 7), np.int64)
        mask[1, 4:] = 0
        gaps = mask.copy()
        gaps[2, 3] = 0  # a mask that is not padding at the right goes to the entry that computes all
        return {
            "ragged": tuned(input_ids=ids, attention_mask=mask)[mask != 0],
            "masked": tuned(input_ids=ids.astype(np.int32), attention_mask=gaps)[gaps != 0],
        }
    source = {"input_features": rng.standard_normal((2, 8, 20), np.float32)} if name == "whisper" else None
    told = tuned.generate(PROMPTS[name], source=source, max_new_tokens=5)
    one = {key: value[:1] for key, value in source.items()} if source else None
    beams = tuned.generate(PROMPTS[name][:1], source=one, max_new_tokens=4, beams=2)
    return {
        "logits": first_logits(tuned, name, source),
        "tokens": np.array([*told.tokens[0], -1, *told.tokens[1]]),
        "beams": np.array(beams.tokens[0]),
        "scores": np.array(beams.scores),
    }


def first_logits(tuned, name, source):
    """Logits of what follows a prompt and one more token."""
    from attntune.runtime.sequences import Sequences

    rows = Sequences(tuned, PROMPTS[name], source, 4)
    return np.concatenate([rows.begin(), rows.step(np.array([3, 4]))])


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
