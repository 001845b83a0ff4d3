"""Every exception attntune raises on purpose.

A message says three things: what was expected, what came, and (where there is one) the command or call that
reproduces it. Catching :class:`AttntuneError` catches them all and nothing else.
"""

from __future__ import annotations


class AttntuneError(Exception):
    """Base of every error attntune raises on purpose."""


class TargetError(AttntuneError, ValueError):
    """A target is unknown, malformed, or lacks what a schedule needs."""


class WorkloadError(AttntuneError, ValueError):
    """A workload's fields contradict each other or name an unknown operator."""


class ConfigError(AttntuneError, ValueError):
    """A knob or its value is not in the configuration space."""


class ScheduleError(AttntuneError):
    """A template could not turn a legal config into a schedule."""


class TuningError(AttntuneError):
    """A tuning run cannot start or cannot go on."""


class WorkerError(AttntuneError):
    """A worker process ended, hung or ran out of memory while it held a task."""


class DatabaseError(AttntuneError):
    """A tuning database cannot be read or written."""


class ModelError(AttntuneError):
    """A model directory, configuration or weight file cannot be used."""


class CompileError(AttntuneError):
    """A model cannot be compiled for the target."""


class ToolchainError(AttntuneError):
    """A compiler that a target needs is missing."""


class ArtifactError(AttntuneError):
    """A compiled artifact is damaged, incomplete, or not for this machine."""


class InputError(AttntuneError, ValueError):
    """An input of a call has the wrong name, dtype, rank or shape."""


class ExportError(AttntuneError):
    """A model cannot be written to, or read from, another format."""


class EngineError(AttntuneError):
    """Another engine is missing or failed while it was compared."""


class ReportError(AttntuneError):
    """A report cannot be written from the given records or comparisons."""


class PrecisionWarning(UserWarning):
    """A target lacks the instructions of the precision that was asked for, and another is used."""
