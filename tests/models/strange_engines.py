"""Engines that misbehave, by `module:Class`; imported in worker processes."""

import os

import numpy as np

from attntune.engines import Engine
from attntune.engines.pytorch import PyTorchEngine


class Wrong(PyTorchEngine):
    title = "Wrong"

    def run(self, inputs):
        return {name: value + np.float32(0.01) for name, value in super().run(inputs).items()}


class Crashing(Engine):
    title = "Crashing"

    def load(self, source, threads):
        self.threads = threads

    def run(self, inputs):
        os.abort()


class CrashingLater(PyTorchEngine):
    """Passes the check and dies in its second turn."""

    title = "Crashing later"

    def bind(self, inputs):
        call, calls = super().bind(inputs), [0]

        def dying():
            calls[0] += 1
            if calls[0] > 12:
                os.abort()
            return call()

        return dying


class Missing(PyTorchEngine):
    title = "Missing"
    packages = ("no_such_package_of_that_name",)
    install = "pip install no-such-package"


class Unloadable(PyTorchEngine):
    title = "Unloadable"

    def load(self, source, threads):
        raise RuntimeError("the model does not fit")
