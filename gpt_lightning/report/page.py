"""Writes the report of one run, or of several side by side, as one page that needs no network."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from gpt_lightning.checkpoint.atomic import written_file
from gpt_lightning.report import tables
from gpt_lightning.report.html import render
from gpt_lightning.report.run import Run, read_runs
from gpt_lightning.report.tokens import TokenText

REPORT_NAME = "report.html"  # in the run's folder


def write_report(folders: Sequence[Path], output: Path) -> list[Run]:
    """Writes the page on the runs whose folders these are, and returns what it has read of them."""
    page = _page(runs := read_runs([*folders]))
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_file(output) as file:
        file.write(page.encode())
    return runs


def _page(runs: list[Run]) -> str:
    from gpt_lightning.report.charts import charts_of, look, own_charts  # slow to import
    from gpt_lightning.report.scripts import chart_script

    charts, own = charts_of(runs), own_charts(runs)
    command = runs[0].facts.get("command")
    return render(
        "report.html",
        runs=runs,
        tables=tables,
        held_out=TokenText(runs[0].held_out),
        command=shlex.join(map(str, command)) if isinstance(command, list) else command,
        charts=charts,
        own=own,
        n_without_chart=len(tables.own_tags(runs)) - len(own),
        specs={chart.name: chart.spec for chart in charts + own},
        looks={"light": look(dark=False), "dark": look(dark=True)},
        script=chart_script() if charts + own else "",
    )


def write_pictures(runs: Sequence[Run], output: Path) -> list[Path]:
    """Writes the charts of these runs as PNG files into a folder, and returns their paths."""
    from gpt_lightning.report.charts import charts_of, own_charts, pictures  # slow to import

    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in pictures(charts_of(runs) + own_charts(runs)):
        paths.append(output / f"{name}.png")
        with written_file(paths[-1]) as file:
            file.write(picture)
    return paths
