"""Puts what is known of runs into tables: figures, differences, text, model, machine."""

import re
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.cells import cell_len, set_cell_size

from gpt_lightning.report.events import Point
from gpt_lightning.report.html import shown
from gpt_lightning.report.run import Run, flat
from gpt_lightning.training.notes import SAMPLES, part_of_text

PARTS = ("data", "step", "validation", "checkpoint", "other")
MEASURED = ("train/", "val/", "test/", "eval/", SAMPLES)
RUN_NAMES = ("run_name", "ckpt_path", "config")  # differ without making a difference
_LONGEST = 40  # characters of a value on a terminal
_OURS = re.compile(
    r"train/(loss|ppl|grad_norm)|(val|test)/(loss|ppl|bpb|share)(/[^/]+)?|epoch|step|hp_metric"
    r"|(data/epochs/|lr-|eval/|samples/|throughput/).*"
).fullmatch


class Table(NamedTuple):
    """Holds rows under a head, which may be empty; `best` is the number of the row to stand out."""

    head: list[str]
    rows: list[list[Any]]
    best: int | None = None


def tiles(run: Run) -> list[tuple[str, Any]]:
    """Lists the few numbers that one looks for first."""
    loss, bpb = run.lowest("val/loss"), run.lowest("val/bpb")
    found: list[tuple[str, Any]] = [
        (_of_part("lowest val loss", run, loss), loss and loss.value),
        (_of_part("bits per byte", run, bpb), bpb and bpb.value),
        ("steps", run.n_steps or None),
        ("parameters", _total(run.parameters)),
        ("tokens per second", _median(run, "throughput/tokens_per_second")),
        ("time", duration(seconds) if (seconds := _seconds(run)) else None),
    ]
    return [(name, value) for name, value in found if value is not None]


def own_tags(runs: Sequence[Run]) -> list[str]:
    """Names what only a module or a callback of somebody's own can have logged."""
    return sorted({tag for run in runs for tag in run.curves if not _OURS(tag)})


def figures(run: Run) -> Table:
    """Lists the last value of what was measured, and the lowest of what should be low."""
    rows, own = [], own_tags([run])
    for tag in sorted(run.curves):
        if tag in own or tag.startswith(MEASURED) and not re.search("/(share|grad_norm)(/|$)", tag):
            is_loss = tag.startswith("val/") or tag in ("train/loss", "train/ppl")
            lowest = run.lowest(tag) if is_loss else None
            where = (lowest.value, lowest.step) if lowest else (None, None)
            name = _of_part(tag, run, run.curves[tag][-1], tag.partition("/")[0])
            rows.append([name, run.last(tag), *where])
    for tag in ("tokens_per_second", "mfu", "peak_memory_gib", "step_seconds"):
        if (value := _median(run, f"throughput/{tag}")) is not None:
            rows.append([f"throughput/{tag}, median", value, None, None])
    return Table(["", "last", "lowest", "at step"], rows)


def time_spent(run: Run) -> Table:
    """Lists the time by parts, which add up to that of the run."""
    parts = _seconds_by_part(run).items()
    totals = {part: seconds for part, seconds in parts if part in PARTS or seconds >= 0.5}
    whole = sum(totals.values())
    found = totals.items() if whole else ()
    rows = [[part, duration(seconds), f"{100 * seconds / whole:.1f} %"] for part, seconds in found]
    return Table(["", "time", "share"], rows)


def _seconds_by_part(run: Run) -> dict[str, float]:
    """Adds up the time by parts; the numbers of a logged row are of the time since the one before it.

    What follows the last row, as the validation at the end does, is of no known part.
    """
    rows = run.curves.get("throughput/step_seconds", [])
    totals = dict.fromkeys(PARTS, 0.0)
    shares = {part: run.curves.get(f"throughput/{part}_share", []) for part in PARTS}
    before = 0
    for number, point in enumerate(rows):
        parts = {part: points[number].value for part, points in shares.items() if number < len(points)}
        steady = 1 - parts.get("validation", 0.0) - parts.get("checkpoint", 0.0)
        whole = (point.step - before) * point.value / steady if steady > 0 else 0.0
        before = point.step
        for part, share in parts.items():
            totals[part] += whole * share
    if rows:
        last = max(points[-1].time for points in run.curves.values())
        totals["after the last logged step"] = max(0.0, last - rows[-1].time)
    return totals


def changed(run: Run) -> Table:
    return Table([], [[name, value] for name, value in flat(run.facts.get("changed"))])


def corpus(run: Run) -> Table:
    """Lists the counts of each split, in a column."""
    names = ["documents", "tokens", "of all", "bytes a token", "longest, tokens"]
    names += ["repeat another", "also in train"]
    found = run.facts.get("corpus")
    splits = {name: counts for name, counts in _items(found) if isinstance(counts, dict)}
    whole = sum(_number(counts.get("tokens")) or 0 for counts in splits.values())
    columns = []
    for name, counts in splits.items():
        tokens, n_bytes = _number(counts.get("tokens")) or 0, _number(counts.get("bytes")) or 0
        share = f"{100 * tokens / whole:.1f} %" if whole else None
        density = n_bytes / tokens if tokens else None
        repeated = counts.get("repeated")
        both = [repeated, None] if name == "train" else [None, repeated]
        known = [counts.get(key) for key in ("documents", "tokens")]
        columns.append([*known, share, density, counts.get("longest"), *both])
    return Table(["", *splits], [[*row] for row in zip(names, *columns)] if columns else [])


def parameters(run: Run) -> Table:
    parts = {name: count for name, count in run.parameters.items() if _number(count)}
    whole = _total(parts) or 1
    rows = [[name.replace("_", " "), count, f"{100 * count / whole:.1f} %"] for name, count in parts.items()]
    return Table(["", "parameters", "share"], rows)


def environment(run: Run) -> Table:
    return Table([], [[name, value] for name, value in _items(run.facts.get("environment"))])


def comparison(runs: Sequence[Run]) -> Table:
    """Lists the runs by their lowest loss, with the options in which they differ.

    Where all have bits per byte, these decide: they compare runs of different tokenizers.
    """
    tag = "val/bpb" if all(run.lowest("val/bpb") for run in runs) else "val/loss"
    options = differing_options(runs)
    head = ["run", "lowest val loss", "bits per byte", "last val loss", "steps", "tokens per second", "time"]
    ranked = sorted(runs, key=lambda run: point.value if (point := run.lowest(tag)) else float("inf"))
    rows: list[list[Any]] = []
    for run in ranked:
        loss, bpb = run.lowest("val/loss"), run.lowest("val/bpb")
        last = next(reversed(run.curves.get("val/loss", ())), None)
        results = [*(_result(run, point) for point in (loss, bpb, last)), run.n_steps]
        rate, seconds = _median(run, "throughput/tokens_per_second"), duration(_seconds(run))
        chosen = [run.options.get(name) for name in options]
        rows.append([run.name, *results, rate, seconds, *chosen])
    return Table([*head, *options], rows, best=0 if ranked and ranked[0].lowest(tag) else None)


def as_text(table: Table) -> str:
    """Writes a table for a terminal: without columns that say nothing, options by their last words."""
    words = [name.rpartition(".")[2] for name in table.head]
    head = [word if words.count(word) == 1 else name for name, word in zip(table.head, words)]
    columns = [
        [name, *(_cut(shown(value)) for value in values)]
        for name, *values in zip(head, *table.rows)
        if any(value is not None for value in values)
    ]
    widths = [max(map(cell_len, column)) for column in columns]
    rows = zip(*([set_cell_size(cell, width) for cell in column] for column, width in zip(columns, widths)))
    return "\n".join("  ".join(row).rstrip() for row in rows)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def differing_options(runs: Sequence[Run]) -> list[str]:
    """Names the options that are not the same in all runs of which they are known."""
    known = [run.options for run in runs if run.options]
    names = dict.fromkeys(name for options in known for name in options)
    missing = object()
    return [
        name
        for name in names
        if name not in RUN_NAMES
        and any(options.get(name, missing) != known[0].get(name, missing) for options in known)
    ]


def duration(seconds: float) -> str:
    """Writes a time as 1:02:03, or 2:03 below an hour."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _of_part(name: str, run: Run, point: Point | None, split: str = "val") -> str:
    """Says beside a name or a value that it was measured on a part of the text, where it was."""
    share = run.share(split, point.step) if point else None
    return name if share is None else f"{name} ({part_of_text(share)})"


def _result(run: Run, point: Point | None) -> float | str | None:
    is_whole = point is None or run.share("val", point.step) is None
    return point and (point.value if is_whole else _of_part(shown(point.value), run, point))


def _seconds(run: Run) -> float:
    """Returns the time of all parts, else from the first value to the last, with the pauses between runs."""
    if whole := sum(_seconds_by_part(run).values()):
        return whole
    times = [point.time for points in run.curves.values() for point in (points[0], points[-1])]
    return max(times) - min(times) if times else 0.0


def _median(run: Run, tag: str) -> float | None:
    points = run.curves.get(tag)
    return statistics.median(point.value for point in points) if points else None


def _items(found: Any) -> list[tuple[str, Any]]:
    return [*found.items()] if isinstance(found, dict) else []


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _total(parts: Any) -> int | None:
    return sum(_number(count) or 0 for _, count in _items(parts)) or None
