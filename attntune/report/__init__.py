"""Records and comparisons to Markdown and plots."""

from __future__ import annotations

from attntune.report.report import write_report

__all__ = ["write_report"]
