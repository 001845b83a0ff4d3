"""Fixtures of the tuning loop's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import Clock, SmallTemplate, ToyTemplate

from attntune import templates, tuner


@pytest.fixture
def toy_template(monkeypatch):
    """The toy template is the one for the toy workload."""
    monkeypatch.setattr(templates, "template_for", lambda workload, target: ToyTemplate())


@pytest.fixture
def small(monkeypatch):
    """A template with six configs instead."""
    monkeypatch.setattr(templates, "template_for", lambda workload, target: SmallTemplate())


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The loop's time, moved by a runner that is given it."""
    clock = Clock()
    monkeypatch.setattr(tuner, "monotonic", clock)
    return clock


@pytest.fixture
def database(tmp_path) -> Path:
    return tmp_path / "tuning.jsonl"
