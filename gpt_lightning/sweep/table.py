"""Shows what has come of the trials: a table, and the losses over each option as a plot."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_lightning.exit_codes import UserError
from gpt_lightning.sweep.search import FINISHED, Outcome
from gpt_lightning.sweep.space import Choice, Range, Varied, short_names

_LONGEST_NOTE = 70  # characters; the trial's log has the rest


def table(found: Sequence[Outcome], varied: Sequence[Varied]) -> str:
    """Returns a line a trial, in the order given."""
    names = short_names(varied)
    rows = [["trial", "val/loss", "at step", *names.values(), ""]]
    for each in found:
        loss = "" if each.loss is None else f"{each.loss:.4f}"
        step = "" if each.step is None else f"{each.step:,}"
        state = "" if each.state == FINISHED else each.state
        if each.note:
            state += f": {textwrap.shorten(each.note, _LONGEST_NOTE, placeholder='...')}"
        rows.append([str(each.number + 1), loss, step, *(each.values.get(name, "") for name in names), state])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = ["  ".join([*(cell.rjust(width) for cell, width in zip(row, widths)), row[-1]]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def save_plot(found: Sequence[Outcome], varied: Sequence[Varied], paths: Sequence[Path]) -> None:
    """Draws the losses over each option, each other choice in a colour of its own; a path's ending decides.

    Lines join the trials that came to their end, where there is one range and one choice at most.
    """
    try:
        import altair as alt
        import vl_convert  # noqa: F401  # by which altair writes files that need no network
    except ImportError as error:
        needed = "altair and vl-convert-python; pip install 'gpt_lightning[sweep]'"
        raise UserError(f"plots need {needed}") from error
    rows = [_row(each, varied) for each in found if each.loss is not None]
    data = alt.Data(values=rows)
    names = short_names(varied)
    charts = []
    for number, each in enumerate(varied):
        others = [other for other, one in enumerate(varied) if isinstance(one, Choice) and other != number]
        color: Any = alt.value("#4c78a8")
        if others:
            color = alt.Color(f"text{others[0]}:N", title=names[varied[others[0]].name])
        shown = [alt.Tooltip(f"text{other}:N", title=names[one.name]) for other, one in enumerate(varied)]
        base = alt.Chart(data, title=names[each.name]).encode(
            x=_axis(alt, each, number),
            y=alt.Y("loss:Q", title="val/loss", scale=alt.Scale(zero=False)),
            color=color,
            tooltip=["trial:Q", "loss:Q", "state:N", *shown],
        )
        chart = base.mark_point(filled=True, size=70).encode(shape=alt.Shape("state:N", title=None))
        if isinstance(each, Range) and len(others) == len(varied) - 1 <= 1:  # a curve for each choice
            chart += base.mark_line(opacity=0.5).transform_filter(f"datum.state == '{FINISHED}'")
        charts.append(chart.properties(width=300 if isinstance(each, Range) else alt.Step(60)))
    chart = alt.hconcat(*charts).resolve_scale(color="independent", y="shared")
    for path in paths:
        options = {"inline": True} if path.suffix == ".html" else {"ppi": 144}
        chart.save(str(path), **options)


def _axis(alt: Any, varied: Varied, number: int) -> Any:
    name = f"value{number}"
    if isinstance(varied, Range):
        scale = alt.Scale(type="log" if varied.is_log else "linear", zero=False, nice=False, padding=10)
        return alt.X(f"{name}:Q", title=varied.name, scale=scale)
    return alt.X(f"{name}:O", title=varied.name, sort=list(varied.values), axis=alt.Axis(labelAngle=0))


def _row(outcome: Outcome, varied: Sequence[Varied]) -> dict[str, Any]:
    row: dict[str, Any] = {"trial": outcome.number + 1, "loss": outcome.loss, "state": outcome.state}
    for number, each in enumerate(varied):
        text = outcome.values[each.name]
        row[f"text{number}"] = text
        row[f"value{number}"] = float(text) if isinstance(each, Range) else text
    return row
