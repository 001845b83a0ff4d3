"""The typer application: every verb under its name."""

from __future__ import annotations

from typing import Annotated

import typer

from attntune import __version__
from attntune.cli.common import command


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attntune {__version__}")
        raise typer.Exit


def build() -> typer.Typer:
    """The application. Plain help text: rich's help alone costs more than the 0.3 s that ``--help`` may take."""
    from attntune.cli import compare, compile, doctor, export, perplexity, records, report, run, target, tune

    app = typer.Typer(
        name="attntune",
        help="Search-tuned kernels for attention and Transformer layers.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def options(
        version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version)] = False,
    ) -> None:
        pass

    for verb in (
        target.target,
        tune.tune,
        compile.compile,
        run.run,
        perplexity.perplexity,
        compare.compare,
        report.report,
        export.export,
        doctor.doctor,
    ):
        app.command(verb.__name__)(command(verb))
    app.add_typer(records.build(), name="records")
    return app
