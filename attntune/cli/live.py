"""Progress of a tuning run on standard error: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from attntune.cli.common import note, seconds_text

if TYPE_CHECKING:
    from attntune.progress import Event, TaskState

_PLAIN_INTERVAL_SECS = 5.0


class Progress(AbstractContextManager["Progress"]):
    """A callable for ``tune(on_event=…)``; shows every workload's trials, best time, ratios and the time left.

    Args:
        live: draw in place; default: whether standard error is a terminal.
    """

    def __init__(self, live: bool | None = None) -> None:
        self.live = sys.stderr.isatty() if live is None else live
        self.tasks: dict[str, TaskState] = {}
        self.trials_done = 0
        self.trials_left: int | None = None
        self._deadline: float | None = None
        self._current = ""
        self._said = time.monotonic()
        self._display: Any = None

    def __enter__(self) -> Progress:
        if self.live:
            from rich.console import Console
            from rich.live import Live

            self._display = Live(get_renderable=self.table, console=Console(stderr=True), refresh_per_second=4)
            self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.stop()

    def __call__(self, event: Event) -> None:
        """Take in one event of the tuner."""
        from attntune.progress import TrialDone

        if not isinstance(event, TrialDone):
            self.tasks[event.workload.key()] = event
            return
        self._current = event.task.workload.key()
        self.tasks[self._current] = event.task
        self.trials_done, self.trials_left = event.trials_done, event.trials_left
        if event.seconds_left is not None:
            self._deadline = time.monotonic() + event.seconds_left
        if not self.live and time.monotonic() - self._said >= _PLAIN_INTERVAL_SECS:
            self._said = time.monotonic()
            note(f"{self.status()}  |  {event.task.workload}: {', '.join(describe(event.task))}")

    def status(self) -> str:
        """``37 trials, 82 s left``."""
        parts = [f"{self.trials_done} trials"]
        if self.trials_left is not None:
            parts.append(f"{self.trials_left} trials left")
        if self._deadline is not None:
            parts.append(f"{max(0.0, self._deadline - time.monotonic()):.0f} s left")
        return ", ".join(parts)

    def table(self) -> Any:
        """The state of every workload, for rich."""
        from rich.table import Table

        table = Table(caption=self.status(), caption_justify="left", box=None, pad_edge=False)
        table.add_column("workload", no_wrap=True, overflow="ellipsis", ratio=1)
        for header in ("calls", "trials", "failed", "best", "vs default", "of peak"):
            table.add_column(header, justify="right", no_wrap=True)
        for key, task in self.tasks.items():
            style = "dim" if task.finished else "bold" if key == self._current else ""
            table.add_row(
                str(task.workload), str(task.calls), str(task.trials), str(task.failures),
                seconds_text(task.best_secs), ratio_text(task.speedup), percent_text(task.peak_fraction), style=style,
            )  # fmt: skip
        return table


def describe(task: TaskState) -> list[str]:
    """``['20 trials', 'best 1.23 ms', '1.15x the default', '78 % of peak']``."""
    words = [f"{task.trials} trials", f"best {seconds_text(task.best_secs)}"]
    if task.speedup is not None:
        words.append(f"{task.speedup:.2f}x the default")
    if task.peak_fraction is not None:
        words.append(f"{percent_text(task.peak_fraction)} of peak")
    return words


def ratio_text(ratio: float | None) -> str:
    """``1.15x``; ``-`` when unknown."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def percent_text(fraction: float | None) -> str:
    """``78 %``; ``-`` when unknown."""
    return "-" if fraction is None else f"{100 * fraction:.0f} %"
