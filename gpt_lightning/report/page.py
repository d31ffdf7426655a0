"""Writes the report of one run, or of several side by side, as one page that needs no network."""

from collections.abc import Sequence
from pathlib import Path

from gpt_lightning.checkpoint.atomic import written_file
from gpt_lightning.report.html import render
from gpt_lightning.report.run import read_runs


def write_report(folders: Sequence[Path], output: Path) -> None:
    """Writes the page on the runs whose folders these are."""
    from gpt_lightning.report.charts import charts_of, look  # slow to import
    from gpt_lightning.report.scripts import chart_script

    runs = read_runs([*folders])
    charts = charts_of(runs)
    page = render(
        "report.html",
        runs=runs,
        charts=charts,
        looks={"light": look(dark=False), "dark": look(dark=True)},
        script=chart_script() if charts else "",
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_file(output) as file:
        file.write(page.encode())


def write_pictures(folders: Sequence[Path], output: Path) -> list[Path]:
    """Writes the charts of these runs as PNG files into a folder, and returns their paths."""
    from gpt_lightning.report.charts import charts_of, pictures  # slow to import

    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in pictures(charts_of(read_runs([*folders]))):
        paths.append(output / f"{name}.png")
        with written_file(paths[-1]) as file:
            file.write(picture)
    return paths
