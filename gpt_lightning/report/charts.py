"""Describes the charts of runs, which Vega draws: in a browser or as a picture."""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import altair as alt

from gpt_lightning.report.events import Point
from gpt_lightning.report.run import Run
from gpt_lightning.report.scripts import vega_lite_version
from gpt_lightning.report.tables import PARTS, own_tags
from gpt_lightning.training.notes import REPETITION

MOST_POINTS = 1000  # of a curve; of each stretch of a longer one its lowest and highest
MOST_OWN = 60  # charts of what somebody else's code has logged
COLORS = "#3b82f6 #f97316 #10b981 #e11d48 #8b5cf6 #ca8a04 #06b6d4 #84cc16 #ec4899 #64748b".split()
FONT = "system-ui, 'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', sans-serif"


class Chart(NamedTuple):
    """Holds what Vega-Lite draws, with its data; `name` is that of a file, too."""

    name: str
    title: str
    spec: dict[str, Any]


class _Curve(NamedTuple):
    name: str  # of its colour
    kind: str  # of its dashes
    points: list[Point]


def look(*, dark: bool) -> dict[str, Any]:
    """Returns the colours and fonts of all charts on a light or a dark page."""
    text, faint = ("#d4d4d8", "#3f3f46") if dark else ("#3f3f46", "#e4e4e7")
    legend = {"labelColor": text, "labelFontSize": 12, "labelLimit": 260, "orient": "top", "title": None}
    axis = {"gridColor": faint, "domainColor": faint, "tickColor": faint, "labelColor": text}
    return {
        "background": None,
        "font": FONT,
        "axis": {**axis, "titleColor": text, "labelFontSize": 12, "titleFontSize": 12},
        "legend": legend,
        "title": {"color": text},
        "rule": {"color": text},
        "range": {"category": COLORS},
        "view": {"stroke": None},
    }


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Lists the charts for which there is something to show."""
    return [
        chart
        for chart in (
            _losses(runs),
            _prefixed(runs, "val/loss/", "loss-of-texts", "Validation loss of each text"),
            _prefixed(runs, "val/bpb/", "bits-of-texts", "Bits per byte of each text"),
            _prefixed(runs, "data/epochs/", "epochs-of-texts", "Epochs of each text"),
            _prefixed(runs, "eval/", "evaluation", "Evaluation"),
            # Of one run it has the shape of the loss; several may have different tokenizers.
            _one_tag(runs, "val/bpb", "bits-per-byte", "Bits per byte") if len(runs) > 1 else None,
            _one_tag(runs, REPETITION, "repetition", "Repeated 4-grams in the samples"),
            _one_tag(runs, "train/grad_norm", "gradient-norm", "Gradient norm"),
            _prefixed(runs, "lr-", "learning-rate", "Learning rate"),
            _one_tag(runs, "throughput/tokens_per_second", "throughput", "Tokens per second"),
            _shares(runs[0]) if len(runs) == 1 else None,
        )
        if chart is not None
    ]


def own_charts(runs: Sequence[Run]) -> list[Chart]:
    """Lists a chart for each value that is not of ours, up to so many."""
    names = {tag: re.sub(r"\W+", "-", tag)[:40] for tag in own_tags(runs)[:MOST_OWN]}
    charts = (_one_tag(runs, tag, f"own-{n}-{names[tag]}", tag) for n, tag in enumerate(names, start=1))
    return [chart for chart in charts if chart is not None]


def _losses(runs: Sequence[Run]) -> Chart | None:
    kinds = ("train", "val")
    tags = [(run, kind, f"{kind}/loss") for run in runs for kind in kinds]
    curves = [_Curve(run.name, kind, run.curves.get(tag, [])) for run, kind, tag in tags]
    return _lines("loss", "Loss", _by_colour(curves, runs), unit="nats a token", log=True, named=True)


def _prefixed(runs: Sequence[Run], prefix: str, name: str, title: str) -> Chart | None:
    """Draws all values whose names begin alike, such as the rates lr-AdamW and lr-Muon."""
    curves = [
        _Curve(run.name, tag.removeprefix(prefix), points)
        for run in runs
        for tag, points in run.curves.items()
        if tag.startswith(prefix)
    ]
    return _lines(name, title, _by_colour(curves, runs), named=True)


def _by_colour(curves: list[_Curve], runs: Sequence[Run]) -> list[_Curve]:
    """Has the curves of one run differ by their colours, since nothing else does."""
    return [curve._replace(name=curve.kind, kind="") for curve in curves] if len(runs) == 1 else curves


def _one_tag(runs: Sequence[Run], tag: str, name: str, title: str) -> Chart | None:
    return _lines(name, title, [_Curve(run.name, "", run.curves.get(tag, [])) for run in runs])


def _lines(
    name: str, title: str, curves: list[_Curve], *, unit: str = "", log: bool = False, named: bool = False
) -> Chart | None:
    """Draws curves; `named` ones differ from the title, so that a single one has a legend, too."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return None
    spec = _of_lines(tuple(curve[:2] for curve in curves), unit, log, named)
    return _chart(name, title, spec, _rows(curves))


@cache  # for Altair checks it value by value, and charts of somebody's own values are many
def _of_lines(curves: tuple[tuple[str, str], ...], unit: str, log: bool, named: bool) -> dict[str, Any]:
    """Describes curves, each of a name and a kind, over the steps.

    What is under the pointer is told; the wheel zooms where Ctrl or Alt is held, and dragging moves.
    """
    names = list(dict.fromkeys(name for name, _ in curves))
    base = alt.Chart().encode(
        x=_steps(),
        y=alt.Y("value:Q", title=unit or None, scale=_scale(log=log), axis=alt.Axis(tickCount=6)),
        color=alt.Color("name:N", sort=names, legend=alt.Legend() if named or len(names) > 1 else None),
    )
    lines = base.mark_line(strokeWidth=1.8, clip=True)
    if any(kind for _, kind in curves):
        lines = lines.encode(strokeDash=alt.StrokeDash("kind:N", sort=["val", "train"]))
    view = alt.selection_interval(bind="scales", zoom="wheel![event.ctrlKey || event.altKey]")
    step = alt.selection_point(
        nearest=True, on="pointerover", clear="pointerout", fields=["step"], empty=False
    )
    # No line shows a value that stands alone.
    seen = alt.when(step).then(alt.value(1)).when("datum.alone").then(alt.value(1)).otherwise(alt.value(0))
    dots = base.mark_point(filled=True, size=45, clip=True).encode(opacity=seen).add_params(view)
    return _described(alt.layer(lines, dots, _values_at(step, curves), data=alt.NamedData(name="points")))


def _values_at(step: alt.Parameter, curves: Sequence[tuple[str, str]]) -> alt.Chart:
    """Draws a rule at the step under the pointer, and tells the values of all curves there."""
    told = [
        alt.Tooltip(f"c{number}:Q", title=" ".join(filter(None, curve)), format=".4~g")
        for number, curve in enumerate(curves)
    ]
    seen = alt.when(step).then(alt.value(0.4)).otherwise(alt.value(0))
    rule = alt.Chart().transform_pivot("curve", value="value", groupby=["step"]).mark_rule(strokeWidth=1)
    return rule.encode(x=_steps(), opacity=seen, tooltip=[_step_told(), *told]).add_params(step)


def _rows(curves: list[_Curve]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, (name, kind, points) in enumerate(curves):
        of_all = {"name": name, "kind": kind, "curve": f"c{number}", "alone": len(points) == 1}
        # Events hold float32, of which more digits are noise.
        seen = ((step, float(f"{value:.6g}")) for step, value, _ in thinned(points))
        rows += ({"step": step, "value": value, **of_all} for step, value in seen)
    return rows


def _steps() -> alt.X:
    return alt.X("step:Q", title="step", scale=_scale(), axis=alt.Axis(tickCount=8, grid=False))


def _scale(*, log: bool = False) -> alt.Scale:
    return alt.Scale(type="log", nice=False) if log else alt.Scale(type="linear", nice=False, zero=False)


def _step_told() -> alt.Tooltip:
    return alt.Tooltip("step:Q", format=",")


def _shares(run: Run) -> Chart | None:
    """Draws what part of the time went where, over the steps, as areas that add up to 1."""
    rows = [
        {"step": step, "share": value, "part": part, "order": number}
        for number, part in enumerate(PARTS)
        for step, value, _ in thinned(run.curves.get(f"throughput/{part}_share", []))
    ]
    if not rows:
        return None
    chart = (
        alt.Chart(alt.NamedData(name="points"))
        .mark_area()
        .encode(
            x=_steps(),
            y=alt.Y("share:Q", title=None, stack="normalize", axis=alt.Axis(format="%")),
            color=alt.Color("part:N", sort=list(PARTS)),
            order="order:O",
            tooltip=[_step_told(), "part:N", alt.Tooltip("share:Q", format=".1%")],
        )
    )
    return _chart("time", "Where the time went, up to each step", _described(chart), rows)


def _described(chart: Any) -> dict[str, Any]:
    found: dict[str, Any] = chart.properties(width="container", height=280).to_dict()
    return found


def _chart(name: str, title: str, spec: dict[str, Any], rows: list[dict[str, Any]]) -> Chart:
    return Chart(name, title, {**spec, "datasets": {"points": rows}})


def thinned(points: list[Point]) -> list[Point]:
    """Leaves of a long curve the lowest and highest point of each stretch, so that no peak is lost."""
    if len(points) <= MOST_POINTS:
        return points
    return [*_extremes(points, -(-2 * len(points) // MOST_POINTS))]


def _extremes(points: list[Point], stretch: int) -> Iterator[Point]:
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        yield from sorted({min(part, key=_value), max(part, key=_value)})


def _value(point: Point) -> float:
    return point.value


def pictures(charts: Iterable[Chart]) -> Iterator[tuple[str, bytes]]:
    """Yields the name of each chart and its PNG, as wide as a slide."""
    import vl_convert  # slow to import

    version = vega_lite_version()
    config = {**look(dark=False), "background": "white", "title": {"fontSize": 18, "anchor": "start"}}
    config["legend"]["columns"] = 5
    for chart in charts:
        spec = {**chart.spec, "width": 900, "height": 420, "title": chart.title, "config": config}
        yield chart.name, vl_convert.vegalite_to_png(spec, vl_version=version, scale=2)
