"""An engine that needs no library: the float64 reference, timed by the host's clock."""

import time
from functools import partial

import numpy as np

from attntune.engines.kernel_engines import KernelEngine


class NumpyKernels(KernelEngine):
    name, title = "cublas", "NumPy"

    def ways(self, source, sets):
        return {"reference": [partial(source.workload.reference, *operands) for operands in sets]}

    def secs(self, call, number):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def to_numpy(self, result):
        return [np.asarray(x, np.float32) for x in result]

    def describe(self):
        return {"version": np.__version__}


class WrongPastTheSample(NumpyKernels):
    """Right where the reference is sampled only: the last element of all is off."""

    def to_numpy(self, result):
        outputs = super().to_numpy(result)
        outputs[0].flat[-1] += 100.0
        return outputs
