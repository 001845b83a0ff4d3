"""A runner that measures nothing: it answers from records. Tests of search and tuning need no compiler that way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from attntune.database.record import Status, TuningRecord
from attntune.measure.runner import Runner
from attntune.measure.trial import Trial


class ReplayRunner(Runner):
    """Answers each trial with what was recorded of the same workload, target, template and config.

    Args:
        records: the recording. Of several records of one config the last counts, final ones only for races.
    """

    def __init__(self, records: Iterable[TuningRecord]) -> None:
        self._measured: dict[tuple[str, str, str, str], TuningRecord] = {}
        self._raced: dict[tuple[str, str, str, str], TuningRecord] = {}
        for record in records:
            key = (record.workload, record.target, record.template, record.config.key())
            (self._raced if record.final else self._measured)[key] = record
        self.replayed = 0
        """Trials answered so far, races not counted."""

    def measure(self, trials: Sequence[Trial]) -> Iterator[TuningRecord]:
        """The recorded results, in order; a trial nobody recorded is a ``run_error`` that says so."""
        for trial in trials:
            self.replayed += 1
            key = trial.key()
            known = self._measured.get(key) or self._raced.get(key)
            yield self._answer(trial, known, final=False)

    def race(self, trials: Sequence[Trial], rounds: int) -> list[TuningRecord]:
        """The recorded final results, at most ``rounds`` samples each; single measurements where there was no race."""
        answers = []
        for trial in trials:
            known = self._raced.get(trial.key()) or self._measured.get(trial.key())
            answer = self._answer(trial, known, final=True)
            answers.append(dataclasses.replace(answer, run_secs=answer.run_secs[:rounds]))
        times = [answer.time for answer in answers]
        return [dataclasses.replace(answer, time=max(times)) for answer in answers]

    def _answer(self, trial: Trial, known: TuningRecord | None, *, final: bool) -> TuningRecord:
        if known is not None:
            return dataclasses.replace(known, final=final, is_default=trial.is_default, seed=trial.seed)
        return TuningRecord(
            trial.workload.key(), trial.target.key(), trial.template, trial.config, Status.RUN_ERROR,
            seed=trial.seed, is_default=trial.is_default, final=final, message="not in recording",
        )  # fmt: skip
