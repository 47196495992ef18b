"""``reapc report OUT``: the page of a build, written again."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("out", type=click.Path(path_type=Path))
def command(out: Path) -> None:
    """Write OUT/report.html again from what lies in OUT, the output folder of a build. Nothing is computed anew."""
    from reapc.cli.compare import build_in
    from reapc.report.data import REPORT
    from reapc.report.write import write_report

    build_in(out)
    write_report(out)
    click.echo(str(out / REPORT))
