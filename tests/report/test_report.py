"""A report says what the events and the configuration say, whoever wrote them."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from gpt_lightning.callbacks.run_facts import parameters_by_part
from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.report import tables
from gpt_lightning.report.charts import MOST_OWN, MOST_POINTS, charts_of, own_charts, thinned
from gpt_lightning.report.events import Point, Text
from gpt_lightning.report.page import write_report
from gpt_lightning.report.run import Run, read_run, read_runs
from gpt_lightning.training.notes import FACTS, HELD_OUT, as_block, note
from gpt_lightning.training.scored_text import from_plain
from tests.report.pages import Page

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\" {{ 7*7 }}"
SHARES = {"data": 0.1, "step": 0.5, "validation": 0.2, "checkpoint": 0.1, "other": 0.1}


def write_run(folder: Path, losses: dict[int, float], *, bpb: float | None = None, **options: object) -> Path:
    """A run as a version without notes has left it: validated at these steps, in 0.5 s a step."""
    with SummaryWriter(str(folder / "logs")) as writer:
        for step, loss in losses.items():
            writer.add_scalar("train/loss", loss + 0.1, step)
            writer.add_scalar("val/loss", loss, step)
            writer.add_scalar("lr-AdamW", 0.003, step)
            writer.add_scalar("throughput/step_seconds", 0.5, step)
            for part, share in SHARES.items():
                writer.add_scalar(f"throughput/{part}_share", share, step)
            if bpb is not None:
                writer.add_scalar("val/bpb", bpb, step)
            writer.add_text("samples/0", f"    step {step}\n    {HOSTILE}\n    我在年青时候", step)
    config = yaml.safe_dump({"run_name": folder.name, **options})
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    return folder


def test_curves_samples_and_options_are_read(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", {10: 3.0, 20: 2.0}, model={"config": {"n_layers": 2}}), "a")
    assert [(step, value) for step, value, _ in run.curves["val/loss"]] == [(10, 3.0), (20, 2.0)]
    texts = {step: f"step {step}\n{HOSTILE}\n我在年青时候" for step in (20, 10)}
    assert [*run.samples.items()] == [(step, [("", text)]) for step, text in texts.items()]
    assert run.options["model.config.n_layers"] == 2 and run.n_steps == 20
    assert run.facts == {} and run.held_out == []


def test_a_resumed_run_has_each_step_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_run(tmp_path / "a", {10: 3.0, 20: 2.5, 30: 2.0})
    with SummaryWriter(str(folder / "logs"), purge_step=21, filename_suffix=".1") as writer:
        writer.add_scalar("val/loss", 1.5, 30)
    run = read_run(folder, "a")
    assert [(step, value) for step, value, _ in run.curves["val/loss"]] == [(10, 3.0), (20, 2.5), (30, 1.5)]
    assert caplog.messages == []


def test_a_resumed_run_has_the_texts_of_what_went_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {10: 3.0, 20: 2.5, 30: 2.0})
    with SummaryWriter(str(folder / "logs"), purge_step=11, filename_suffix=".1") as writer:
        writer.add_text("samples/0", "    once more", 20)
    assert [*read_run(folder, "a").samples.items()][0] == (20, [("", "once more")])
    assert [*read_run(folder, "a").samples] == [20, 10]


@pytest.mark.parametrize("places", [("logs", "logs"), ("logs/version_9", "logs/version_10")])
def test_what_a_version_has_logged_twice_is_what_it_logged_last(tmp_path: Path, places: list[str]) -> None:
    for number, (place, losses) in enumerate(zip(places, ({20: 2.0, 30: 1.9, 40: 1.8}, {30: 1.5, 35: 1.4}))):
        with SummaryWriter(str(tmp_path / place), filename_suffix=f".{number}") as writer:
            for step, loss in losses.items():
                writer.add_scalar("val/loss", loss, step)
    (tmp_path / "config.yaml").touch()
    curve = read_run(tmp_path, "a").curves["val/loss"]
    assert [(step, round(value, 3)) for step, value, _ in curve] == [(20, 2.0), (30, 1.5), (35, 1.4)]


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {10: 3.0, 20: math.nan, 30: math.inf})
    assert [point.step for point in read_run(folder, "a").curves["val/loss"]] == [10]
    write_report([folder], tmp_path / "report.html")
    json.loads(Page(tmp_path / "report.html").scripts[0], parse_constant=pytest.fail)


def test_a_folder_of_several_runs_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, {10: 3.0})
    with pytest.raises(UserError, match="holds several runs .*; name one or more"):
        read_run(tmp_path, "both")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / place / "a", {10: 3.0}) for place in ("here", "there")]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_long_curves_keep_their_peaks() -> None:
    points = [Point(step, float(step == 77_777), 0.0) for step in range(100_000)]
    left = thinned(points)
    assert len(left) <= MOST_POINTS and points[77_777] in left and left == sorted(left)
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_texts_of_a_run_begin_with_its_samples_and_old_notes_are_read(tmp_path: Path) -> None:
    assert min(FACTS, HELD_OUT) > "samples/"  # as TensorBoard orders its page
    folder = write_run(tmp_path / "a", {10: 3.0})
    for number, (facts, held_out) in enumerate((("run/facts", "run/held_out"), (FACTS, HELD_OUT))):
        with SummaryWriter(str(folder / "logs"), filename_suffix=f".{number + 1}") as writer:
            writer.add_text(facts, json.dumps({"vocabulary": number}), 0)
            writer.add_text(held_out, json.dumps([[str(number), "name", None, []]]), 10)
        run = read_run(folder, "a")
        assert run.facts == {"vocabulary": number} and run.held_out[0].text == str(number)


def test_samples_are_in_the_order_of_their_prompts_which_are_set_apart(tmp_path: Path) -> None:
    prompts = ["", "<b>one</b>\n two", "我", *"3456789", "ten", "eleven"]
    with SummaryWriter(str(tmp_path / "logs")) as writer:
        writer.add_text(FACTS, json.dumps({"prompts": prompts}), 0)
        for number, prompt in enumerate(prompts[:-1]):
            writer.add_text(f"samples/{number}", as_block(f"{prompt} and so on"), 5)
        writer.add_text("samples/11", as_block("another prompt"), 5)
    found = read_run(tmp_path, "a").samples[5]
    assert found == [*((prompt, " and so on") for prompt in prompts[:-1]), ("", "another prompt")]
    write_report([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<div class="text" lang=""><b>我</b> and so on</div>' in page
    assert '<div class="text" lang="">another prompt</div>' in page
    assert "<b>&lt;b&gt;one&lt;/b&gt;\n two</b> and so on" in page


def test_the_time_is_added_up_by_its_parts(tmp_path: Path) -> None:
    # 20 steps of 0.5 s are 10 s, which are 0.7 of all time.
    rows = tables.time_spent(read_run(write_run(tmp_path / "a", {10: 3.0, 20: 2.0}), "a")).rows
    seconds = {part: share * 10 / 0.7 for part, share in SHARES.items()}
    assert [row[:2] for row in rows] == [[part, tables.duration(seconds[part])] for part in tables.PARTS]
    assert [row[2] for row in rows] == [f"{100 * share:.1f} %" for share in SHARES.values()]


def test_the_card_has_the_time_of_all_parts_also_before_the_first_row_and_after_the_last(
    tmp_path: Path,
) -> None:
    at = 1_000_000.0
    with SummaryWriter(str(tmp_path / "logs")) as writer:
        for step in (10, 20):  # of 2 s each: 40 s, of which 20 are before the first value
            writer.add_scalar("throughput/step_seconds", 2.0, step, walltime=at + 2 * step)
            writer.add_scalar("throughput/step_share", 1.0, step, walltime=at + 2 * step)
        writer.add_scalar("val/loss", 3.0, 20, walltime=at + 45)
    run = read_run(tmp_path, "a")
    rows = tables.time_spent(run).rows
    assert [row[:2] for row in rows if row[1] != "0:00"] == [
        ["step", "0:40"],
        ["after the last logged step", "0:05"],
    ]
    assert dict(tables.tiles(run))["time"] == "0:45" == tables.comparison([run]).rows[0][6]


def test_what_was_measured_on_a_part_of_the_text_says_so(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, {10: 3.0, 20: 2.5}, bpb=1.5) for name in ("part", "whole")]
    with SummaryWriter(str(folders[0] / "logs"), filename_suffix=".1") as writer:
        for step in (10, 20):
            writer.add_scalar("val/share", 0.25, step)
    part, whole = runs = read_runs(folders)
    assert {"lowest val loss (25% of text)", "bits per byte (25% of text)"} < dict(tables.tiles(part)).keys()
    assert {"lowest val loss", "bits per byte"} < dict(tables.tiles(whole)).keys()
    names = [row[0] for row in tables.figures(part).rows]
    assert {"val/loss (25% of text)", "val/bpb (25% of text)", "train/loss"} < {*names}
    rows = {row[0]: row[1:4] for row in tables.comparison(runs).rows}
    assert rows == {
        "part": ["2.5 (25% of text)", "1.5 (25% of text)", "2.5 (25% of text)"],
        "whole": [2.5, 1.5, 2.5],
    }


def test_losses_have_their_lowest_value(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", {10: 2.0, 20: 3.0}), "a")
    rows = {tag: [last, lowest, step] for tag, last, lowest, step in tables.figures(run).rows}
    assert rows["val/loss"] == [3.0, 2.0, 10]
    assert rows["train/loss"] == [pytest.approx(3.1), pytest.approx(2.1), 10]


def test_repeated_text_is_told_of_each_split(tmp_path: Path) -> None:
    known = {"documents": 4, "tokens": 30, "bytes": 60, "longest": 9}
    corpus = {"train": {**known, "repeated": 2}, "val": {**known, "repeated": 1}}
    old = {"train": known, "val": known}
    for noted, counts in ((corpus, [(2, None), (None, 1)]), (old, [(None, None)] * 2)):
        facts = {FACTS: [Text(0, json.dumps({"corpus": noted}))]}
        table = tables.corpus(Run("a", tmp_path, {}, facts, {}))
        assert table.head == ["", "train", "val"]
        rows = {name: (train, val) for name, train, val in table.rows}
        assert [rows["repeat another"], rows["also in train"]] == counts
        equal = {"documents": 4, "tokens": 30, "of all": "50.0 %", "bytes a token": 2.0, "longest, tokens": 9}
        assert {name: (value, value) for name, value in equal.items()}.items() < rows.items()


def test_the_best_run_comes_first_by_bits_per_byte(tmp_path: Path) -> None:
    data = {"seq_len": 128}
    folders = [
        write_run(tmp_path / "bytes", {10: 1.5, 20: 1.6}, bpb=2.2, data={**data, "tokenizer": "bytes"}),
        write_run(tmp_path / "bpe", {10: 4.5, 20: 4.0}, bpb=1.9, data={**data, "tokenizer": "bpe"}),
    ]
    runs = read_runs(folders)
    assert tables.differing_options(runs) == ["data.tokenizer"]
    table = tables.comparison(runs)
    assert [row[0] for row in table.rows] == ["bpe", "bytes"] and table.best == 0
    assert [row[-1] for row in table.rows] == ["bpe", "bytes"] and table.head[-1] == "data.tokenizer"
    assert [row[1] for row in table.rows] == [4.0, 1.5]
    (folders[0] / "config.yaml").unlink()
    assert tables.differing_options(read_runs(folders)) == []
    without = [write_run(tmp_path / name, {10: loss}) for name, loss in (("c", 4.0), ("d", 3.0))]
    assert [row[0] for row in tables.comparison(read_runs(without)).rows] == ["d", "c"]


def test_the_table_of_a_terminal_has_the_same_rows(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "我的", {10: 4.5, 20: 4.0}, data={"seed": 1, "files": ["x" * 99]}, seed=7),
        write_run(tmp_path / "b", {10: 3.5, 20: 3.25}, data={"seed": 2, "files": []}, seed=8),
    ]
    table = tables.comparison(read_runs(folders))
    assert [row[0] for row in table.rows] == ["b", "我的"]
    head, *lines = tables.as_text(table).splitlines()
    time = table.rows[0][6]
    assert re.split(r"\s{2,}", head) == [
        *("run", "lowest val loss", "last val loss", "steps", "time"),  # nothing has bits per byte or a rate
        *("files", "data.seed", "seed"),
    ]
    cells = [re.split(r"\s{2,}", line) for line in lines]
    assert cells == [
        ["b", "3.25", "3.25", "20", time, "[]", "2", "8"],
        ["我的", "4", "4", "20", time, "x" * 39 + "…", "1", "7"],
    ]
    assert head.index("lowest") == lines[0].index("3.25") == lines[1].index("4") + 2  # two wide characters


def test_train_and_val_share_a_chart(tmp_path: Path) -> None:
    charts = charts_of(read_runs([write_run(tmp_path / "a", {10: 3.0, 20: 2.0})]))
    rows = charts[0].spec["datasets"]["points"]
    found = [(row["name"], row["step"]) for row in rows]
    assert found == [("train", 10), ("train", 20), ("val", 10), ("val", 20)]
    assert [chart.name for chart in charts] == ["loss", "learning-rate", "time"]


@pytest.mark.parametrize("kinds", [("train",), ("val",), ("train", "val")])
def test_the_losses_of_a_run_have_a_legend_also_where_one_is_alone(
    tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    curves = {f"{kind}/loss": [Point(1, 3.0, 0.0), Point(2, 2.0, 1.0)] for kind in kinds}
    curves["train/grad_norm"] = curves[f"{kinds[0]}/loss"]
    legends = {}
    for chart in charts_of([Run("a", tmp_path, curves, {}, {})]):
        color = chart.spec["layer"][0]["encoding"]["color"]
        legends[chart.name] = color["sort"] if color["legend"] is not None else None
    assert legends == {"loss": [*kinds], "gradient-norm": None}  # whose name is the chart's


def test_tasks_and_bits_per_byte_have_charts(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, {10: 3.0, 20: 2.0}, bpb=1.9) for name in ("a", "b")]
    for folder in folders:
        with SummaryWriter(str(folder / "logs"), filename_suffix=".1") as writer:
            writer.add_scalar("eval/mine/acc", 0.5, 20)
    charts = {chart.name: chart for chart in charts_of(read_runs(folders))}
    rows = charts["evaluation"].spec["datasets"]["points"]
    assert [(row["name"], row["kind"], row["value"]) for row in rows] == [(n, "mine/acc", 0.5) for n in "ab"]
    assert "bits-per-byte" in charts and "time" not in charts


@pytest.mark.parametrize("n_runs", [1, 2])
def test_values_of_ones_own_have_a_chart_each(tmp_path: Path, n_runs: int) -> None:
    tags = ["my/loss", "my-loss", "val/accuracy", "train/loss_ema", "<b>" * 100]
    folders = [write_run(tmp_path / name, {10: 3.0, 20: 2.0}, bpb=1.0) for name in "ab"[:n_runs]]
    for folder in folders:
        with SummaryWriter(str(folder / "logs"), filename_suffix=".1") as writer:
            for number, tag in enumerate(tags):
                writer.add_scalar(tag, number, 20)
            for tag in ("epoch", "step", "throughput/mfu", "eval/mine/acc", "val/share", "hp_metric"):
                writer.add_scalar(tag, 1.0, 20)
    runs = read_runs(folders)
    charts = own_charts(runs)
    assert [chart.title for chart in charts] == sorted(tags) and len({chart.name for chart in charts}) == 5
    found = {chart.title: [row["value"] for row in chart.spec["datasets"]["points"]] for chart in charts}
    assert found == {tag: [number] * n_runs for number, tag in enumerate(tags)}
    assert {*tags} < {row[0] for row in tables.figures(runs[0]).rows}
    assert all(re.fullmatch(r"[\w-]{1,50}", chart.name) for chart in charts)  # as a file's
    write_report(folders, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert {chart.name for chart in charts} < json.loads(page.scripts[0]).keys() and tags[-1] in page.text


def test_of_very_many_values_of_ones_own_the_rest_is_counted(tmp_path: Path) -> None:
    curves = {f"norm/{number}": [Point(1, 1.0, 0.0)] for number in range(MOST_OWN + 3)}
    assert len(own_charts([Run("a", tmp_path, curves, {}, {})])) == MOST_OWN
    with SummaryWriter(str(tmp_path / "logs")) as writer:
        for tag in curves:
            writer.add_scalar(tag, 1.0, 1)
    write_report([tmp_path], tmp_path / "report.html")
    assert "TensorBoard has 3 more." in Page(tmp_path / "report.html").text


@pytest.mark.parametrize("n_runs", [1, 2])
def test_nothing_that_a_run_holds_acts_or_is_fetched(tmp_path: Path, n_runs: int) -> None:
    names = ["<img src=x>.[0]", "b"][:n_runs]
    folders = [write_run(tmp_path / name, {10: 3.0, 20: 2.0}, data={"x": HOSTILE}) for name in names]
    with SummaryWriter(str(folders[0] / "logs"), filename_suffix=".1") as writer:
        facts = {"environment": {HOSTILE: HOSTILE}, "command": [HOSTILE]}
        writer.add_text("run/facts", "    " + json.dumps(facts))
        writer.add_text("run/held_out", "    " + json.dumps([[HOSTILE, HOSTILE, -1.0, [[HOSTILE, -2.0]]]]))
    write_report(folders, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.fetches() == [] and page.handlers() == [] and len(page.scripts) == 4
    assert "img" not in {tag for tag, _ in page.elements}
    assert HOSTILE in page.text and "我在年青时候" in page.text
    policy = next(each["content"] for tag, each in page.elements if tag == "meta" and "http-equiv" in each)
    assert policy is not None and policy.startswith("default-src 'none'")
    assert set(json.loads(page.scripts[0])) == {chart.name for chart in charts_of(read_runs(folders))}


@pytest.mark.parametrize(
    "facts",
    [
        "[]",
        "{",
        '{"changed": 3, "corpus": [1], "parameters": {"a": "b"}, "environment": "x", "command": 7}',
        '{"corpus": {"train": 3, "val": {"tokens": "many"}}, "parameters": {"a": true}, "vocabulary": {}}',
        "[" * 100_000,
    ],
)
def test_notes_of_any_kind_are_survived(tmp_path: Path, facts: str) -> None:
    folder = write_run(tmp_path / "a", {10: 3.0})
    with SummaryWriter(str(folder / "logs"), filename_suffix=".1") as writer:
        for tag in ("run/facts", "run/held_out"):
            writer.add_text(tag, facts)
    write_report([folder], tmp_path / "report.html")
    assert "lowest val loss" in Page(tmp_path / "report.html").text


def test_notes_are_read_whatever_lines_their_texts_hold(tmp_path: Path) -> None:
    rows = [["\u2028after", "\x85", None, [["\u2029\r\x0b", -2.0]]], ["\n", "\x1c", -1.0, []]]
    logger = TensorBoardLogger(tmp_path, name="logs", version="")
    trainer: Any = SimpleNamespace(loggers=[logger], global_step=3)
    note(trainer, FACTS, facts := {"command": ["fit", "a\u2028b", "c\n    d"]})
    note(trainer, HELD_OUT, rows)
    logger.experiment.add_text("samples/0", as_block(text := "one\rtwo\u2028three\n\n    four\n"), 3)
    logger.experiment.close()
    run = read_run(tmp_path, "a")
    assert run.facts == facts and run.held_out == from_plain(rows) and len(run.held_out) == 2
    assert run.samples == {3: [("", text)]}


@pytest.mark.parametrize("config", ["a: &a [1]\nb: *a", "a: [", "[1]", "\x00", "{" * 5000])
def test_a_configuration_that_cannot_be_read_is_left_out(tmp_path: Path, config: str) -> None:
    folder = write_run(tmp_path / "a", {10: 3.0})
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    assert read_run(folder, "a").options == {}


def test_the_script_is_put_together_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt_lightning.report.scripts import chart_script

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda snippet, version: f"{snippet} {version}")
    script = chart_script()
    assert re.fullmatch(r"window\.vegaEmbed = vegaEmbed; v6_\d+", script)
    monkeypatch.setattr("vl_convert.javascript_bundle", pytest.fail)
    assert chart_script() == script


def test_without_a_cache_folder_the_script_is_made_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt_lightning.report.scripts import chart_script

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda snippet, version: "made")
    assert chart_script() == "made"


def test_an_unfinished_run_has_a_report(tmp_path: Path) -> None:
    run = Run("a", tmp_path, {}, {}, {})
    assert charts_of([run]) == [] and tables.tiles(run) == [] and tables.figures(run).rows == []
    assert tables.comparison([run, run]).best is None


def test_the_parts_of_an_old_runs_model_are_read_from_its_checkpoint(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {10: 3.0})
    assert read_run(folder, "a").parameters == {}
    config = GPTConfig(vocab_size=11, max_position_embeddings=5, n_layers=2, n_heads=2, d_model=4)
    weights = {f"model.{name}": tensor for name, tensor in GPTModel(config).state_dict().items()}
    torch.save({"state_dict": weights}, folder / "last.ckpt")
    assert read_run(folder, "a").parameters == parameters_by_part(config)
    for contents in ([1], {"state_dict": {"model.x": 3}}, {"state_dict": {1: torch.ones(3)}}):
        torch.save(contents, folder / "last.ckpt")
        assert set(read_run(folder, "a").parameters) <= {"1"}
