"""Runs the program end to end on a tiny corpus: what a user types, and what it leaves behind."""

import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_lightning.__main__ import main
from gpt_lightning.checkpoint.checkpoint import Checkpoint, load_model
from gpt_lightning.checkpoint.contents import VALIDATION_KEY
from gpt_lightning.data.cache_folder import BeingBuilt
from gpt_lightning.data.parts import SharedWork
from gpt_lightning.generation.journal import lock_output
from tests.cli.conftest import Program
from tests.log import TIME

pytestmark = pytest.mark.slow
Config = Callable[..., Path]


@pytest.fixture
def fitted(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """The folder of a finished run."""
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(tiny_config())])
    return tmp_path / "checkpoints" / "tiny"


def test_fit_leaves_a_run_folder(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {path.name for path in fitted.iterdir()}
    assert {"last.ckpt", "config.yaml", "logs"} < names
    assert not (fitted / "last.ckpt").is_symlink()
    best = [name for name in names if name.startswith("step")]
    assert best and set(best) < {"step000003.ckpt", "step000006.ckpt"}
    checkpoint = Checkpoint.open(fitted / "last.ckpt").contents
    assert checkpoint["global_step"] == 6
    captured = capsys.readouterr()
    command = shlex.split(captured.err.strip().splitlines()[-1])
    assert Path(command[command.index("--ckpt_path") + 1]).resolve() == fitted / "last.ckpt"
    main(command[command.index("generate") :])
    assert capsys.readouterr().out.startswith(command[command.index("--prompt") + 1])
    assert "Tip" not in captured.err and "💡" not in captured.err


def test_a_plain_fit_warns_of_nothing_that_we_override(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        main(["fit", "--config", str(tiny_config())])
    assert not [str(each.message) for each in told if "overridden" in str(each.message)]


def test_tensorboard_shows_what_it_should(fitted: Path) -> None:
    events = EventAccumulator(str(fitted / "logs"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    every_step = ("train/loss", "train/ppl", "train/grad_norm", "lr-AdamW", "throughput/tokens_per_second")
    for name in every_step:
        assert [event.step for event in scalars[name]] == [1, 2, 3, 4, 5, 6], name
    for name in ("val/ppl", "val/bpb"):
        assert [event.step for event in scalars[name]] == [3, 6], name
    assert {event.step for event in scalars["val/loss"]} == {3, 6}
    epochs = [event.value for event in scalars["epoch"]]
    assert 0 < epochs[0] < 1 and epochs == sorted(epochs)
    assert scalars["train/ppl"][0].value == pytest.approx(math.exp(scalars["train/loss"][0].value), rel=1e-4)
    assert any(tag.startswith("samples/0") for tag in events.Tags()["tensors"])
    assert "_hparams_/session_start_info" in str(events.summary_metadata) or "hparams" in str(events.Tags())
    assert "hp_metric" not in scalars


def test_predict_needs_only_a_checkpoint_and_prompts(
    fitted: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus.unlink()
    before = {path for path in tmp_path.rglob("*")}
    capsys.readouterr()
    main(["predict", "--data.prompts", '["The cat", "", "A \\ud83d\\udc15"]'])  # as JSON in ASCII has a dog
    captured = capsys.readouterr()
    written = {path for path in tmp_path.rglob("*")} - before
    assert written == {fitted / "predictions.jsonl"}
    rows = [
        json.loads(line) for line in (fitted / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["prompt"] for row in rows] == ["The cat", "", "A \U0001f415"]
    keys = ["prompt", "completion", "prompt_tokens", "completion_tokens", "finish_reason"]
    assert all(list(row) == keys for row in rows)
    assert captured.out == "\n\n".join(row["prompt"] + row["completion"] for row in rows) + "\n"
    assert "last.ckpt" in captured.err


def test_the_command_line_wins_over_the_checkpoint_in_sampling(
    fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            "predict",
            "--data.prompts",
            "The cat",
            "--generation.max_new_tokens",
            "3",
            "--output",
            "out/p.jsonl",
        ]
    )
    (row,) = [json.loads(line) for line in Path("out/p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row["completion_tokens"] <= 3 and row["finish_reason"] in ("length", "eos")


def test_a_prompts_file_in_order_whatever_the_batch_size(fitted: Path, tmp_path: Path) -> None:
    prompts = [f"The {word} " * length for length, word in enumerate("cat dog house garden river".split(), 1)]
    Path("prompts.txt").write_text("\n".join(prompts) + "\n")
    outputs = []
    for batch_size in (1, 3):
        words = ["predict", "--data.prompts_file", "prompts.txt", "--data.batch_size", str(batch_size)]
        main([*words, "--output", f"{batch_size}.jsonl"])
        outputs.append(Path(f"{batch_size}.jsonl").read_text())
    assert outputs[0] == outputs[1]
    assert [json.loads(line)["prompt"] for line in outputs[0].splitlines()] == prompts


def test_an_output_that_another_writes_or_that_is_no_file_is_refused(
    fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = lock_output(Path("p.jsonl"))
    for output, message in (("p.jsonl", "another process is writing it"), (os.devnull, "is no file")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(["predict", "--data.prompts", "x", "--output", output])
        assert exit.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    release()
    assert not list(Path().glob("*p.jsonl*"))


def test_an_architecture_flag_against_the_checkpoint_is_refused(
    fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["predict", "--model.config.n_layers", "3", "--data.prompts", "x"])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert "model.config.n_layers=3" in message and "2" in message


def test_validate_and_test_repeat_the_last_validation(
    fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = EventAccumulator(str(fitted / "logs"))
    events.Reload()
    expected = events.Scalars("val/loss")[-1].value
    capsys.readouterr()
    for verb, split in (("validate", "val"), ("test", "test")):
        main([verb, "--ckpt_path", str(fitted / "last.ckpt")])
        captured, said = capsys.readouterr()
        shown = re.search(rf"{split}/loss\s*│ ([0-9.]+)", captured)
        assert shown is not None and float(shown[1]) == pytest.approx(expected, abs=1e-6), captured
        assert ("no data.test_files: what follows is measured on" in said) is (verb == "test")


def test_rows_say_what_was_measured_on_a_part_of_the_text(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(tiny_config(trainer={"limit_val_batches": 1, "max_steps": 3}))])
    (row,) = re.findall(rf"^{TIME}(step 3: .*)$", capsys.readouterr().err, re.MULTILINE)
    part = re.search(r"val/bpb [0-9.]+  \(val: ([0-9.]+% of text)\)", row)
    assert part is not None, row
    assert 0 < float(part[1].split("%")[0]) < 50
    events = EventAccumulator("checkpoints/tiny/logs")
    events.Reload()
    share = events.Scalars("val/share")[-1].value
    assert f"{100 * share:.3g}% of text" == part[1]
    assert Checkpoint.open(Path("checkpoints/tiny/last.ckpt")).contents[VALIDATION_KEY]["whole"] is False
    rows = {verb: measured(verb, capsys) for verb in ("validate", "test")}
    assert rows["validate"].keys() == {f"val/{name} ({part[1]})" for name in ("loss", "ppl", "bpb")}
    assert rows["test"].keys() == {"test/loss", "test/ppl", "test/bpb"}
    whole = measured("validate", capsys, "--trainer.limit_val_batches", "1.0")
    assert whole == {name.replace("test", "val"): value for name, value in rows["test"].items()}
    (name, *_) = measured("test", capsys, "--trainer.limit_test_batches", "1")
    assert name.endswith(f"({part[1]})")
    for verb, option in (("validate", "limit_val_batches"), ("test", "limit_test_batches")):
        with pytest.raises(SystemExit) as exit:
            measured(verb, capsys, f"--trainer.{option}", "0")
        said = f"error: trainer.{option}=0 leaves nothing to {verb} on; give 1.0"
        assert exit.value.code == 2 and said in capsys.readouterr().err


def measured(verb: str, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """The rows of the table that a verb prints."""
    capsys.readouterr()
    main([verb, "--ckpt_path", "checkpoints/tiny/last.ckpt", *words])
    found = (line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if "/" in line)
    return {name.strip(): value.strip() for name, value in found}


def test_a_second_fit_takes_a_folder_of_its_own(fitted: Path, tmp_path: Path) -> None:
    before = (fitted / "last.ckpt").read_bytes()
    main(["fit", "--config", str(tmp_path / "tiny.yaml")])
    assert (fitted / "last.ckpt").read_bytes() == before
    assert (fitted.with_name("tiny-2") / "last.ckpt").is_file()


def test_a_resumed_fit_equals_the_uninterrupted_one(
    tiny_config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 12, "default_root_dir": str(tmp_path)}
    config = str(tiny_config(trainer=settings, checkpoint={"save_top_k": -1}))
    main(["fit", "--config", config, "--run_name", "whole"])
    middle = tmp_path / "checkpoints" / "whole" / "step000006.ckpt"
    main(["fit", "--config", config, "--run_name", "resumed", "--ckpt_path", str(middle)])
    folders = [tmp_path / "checkpoints" / name for name in ("whole", "resumed")]
    whole, resumed = (Checkpoint.open(folder / "last.ckpt").contents for folder in folders)
    assert whole["global_step"] == resumed["global_step"] == 12
    assert whole["TextDataModule"]["consumed_samples"] == resumed["TextDataModule"]["consumed_samples"] == 48
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], tensor), name
    capfd.readouterr()
    main(["fit", "--config", config, "--run_name", "done", "--ckpt_path", str(folders[0] / "last.ckpt")])
    assert not (tmp_path / "checkpoints" / "done" / "last.ckpt").exists(), "no step was left to take"
    assert "predict --ckpt_path" not in capfd.readouterr().err


def test_print_config_gives_a_file_that_runs(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", str(tiny_config()), "--print_config"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["model"]["config"]["d_model"] == 16
    (tmp_path / "printed.yaml").write_text(text, encoding="utf-8")
    main(["fit", "--config", "printed.yaml"])
    assert (tmp_path / "checkpoints" / "printed" / "last.ckpt").is_file()


def test_the_saved_configuration_names_no_checkpoint(fitted: Path, tmp_path: Path) -> None:
    main(["fit", "--config", str(tmp_path / "tiny.yaml"), "--ckpt_path", "last", "--trainer.max_steps", "9"])
    assert Checkpoint.open(fitted / "last.ckpt").step == 9
    assert yaml.safe_load((fitted / "config.yaml").read_text(encoding="utf-8"))["ckpt_path"] is None


def test_the_checkpoint_alone_is_enough(fitted: Path) -> None:
    model, tokenizer = load_model(fitted / "last.ckpt")
    token_ids = tokenizer.encode("The cat sees")
    assert model(torch.tensor([token_ids])).logits.shape == (1, len(token_ids), tokenizer.vocab_size)
    assert tokenizer.decode(token_ids) == "The cat sees"


def test_prepare_fills_the_cache_that_fit_uses(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(tiny_config())
    main(["prepare", "--config", config])
    assert not (tmp_path / "checkpoints").exists()
    (tokens,) = (tmp_path / "cache").glob("tokens-*/train.tokens.bin")
    changed = tokens.stat().st_mtime_ns
    main(["fit", "--config", config])
    assert tokens.stat().st_mtime_ns == changed


def test_prepare_in_a_task_of_an_array_leaves_what_others_are_at(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    words = ["prepare", "--config", str(tiny_config())]
    main(words)
    (tokens,) = (tmp_path / "cache").glob("tokens-*/train.tokens.bin")
    assert "with other processes: parts to tokenize: 1" in capfd.readouterr().err
    shutil.rmtree(tokens.parent)
    opened = SharedWork._opened

    def refused(*args: Any, waits: bool = True) -> Any:
        if not waits and args[1] == "tokens":
            raise BeingBuilt
        return opened(*args, waits=waits)

    monkeypatch.setattr(SharedWork, "_opened", refused)
    main(words)
    assert "parts made here: 0 of 1; other processes are at the rest" in capfd.readouterr().err
    assert not tokens.exists()


def test_epochs_mean_passes_over_the_corpus(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(tiny_config(trainer={"max_steps": -1, "max_epochs": 2, "val_check_interval": 1.0}))
    main(["fit", "--config", config])
    checkpoint = Checkpoint.open(tmp_path / "checkpoints" / "tiny" / "last.ckpt").contents
    (tokens,) = (tmp_path / "cache").glob("tokens-*/train.tokens.bin")
    windows = math.ceil(tokens.stat().st_size / 2 / 16)
    assert checkpoint["TextDataModule"]["consumed_samples"] == 2 * windows
    assert checkpoint["global_step"] == 2 * math.ceil(windows / 4)


def test_validation_interval_counts_optimizer_steps(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(tiny_config(trainer={"accumulate_grad_batches": 3}))])
    events = EventAccumulator(str(tmp_path / "checkpoints" / "tiny" / "logs"))
    events.Reload()
    assert sorted({event.step for event in events.Scalars("val/loss")}) == [3, 6]


def losses(folder: Path, name: str) -> list[float]:
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


def test_two_ddp_processes_give_the_numbers_of_one(
    program: Program, tiny_config: Config, tmp_path: Path
) -> None:
    config = str(tiny_config(trainer={"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}))
    program("fit", "--config", config, "--run_name", "one", "--data.batch_size", "6")
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.batch_size", "3"]
    program("fit", "--config", config, "--run_name", "two", *ddp, ranks=2)
    folder = tmp_path / "checkpoints"
    for name, tolerance in (("train/loss", 2e-6), ("val/loss", 1e-6), ("train/grad_norm", 1e-5)):
        assert losses(folder / "two", name) == pytest.approx(
            losses(folder / "one", name), abs=tolerance
        ), name
    # Prompts are spread over the ranks and come back in one file, in order, each once.
    prompts = json.dumps([f"The {word}" for word in "cat dog house garden river".split()])
    ckpt = ["--ckpt_path", str(folder / "one" / "last.ckpt"), "--data.prompts", prompts]
    single = program("predict", *ckpt, "--output", "single.jsonl")
    double = program("predict", *ckpt, "--output", "double.jsonl", *ddp, ranks=2)
    assert (tmp_path / "single.jsonl").read_text() == (tmp_path / "double.jsonl").read_text()
    assert single.out == double.out
    # One prompt for two ranks.
    lonely = program("predict", *ckpt[:2], "--data.prompts", "The cat", *ddp, ranks=2)
    assert lonely.out.startswith("The cat")


def test_a_place_that_cannot_be_written_is_named(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    commands = (
        ["fit", "--config", "tiny.yaml", "--trainer.default_root_dir", "file/runs"],
        ["fit", "--config", "tiny.yaml", "--data.cache_dir", "file/cache"],
        ["predict", "--output", "file/out/predictions.jsonl"],
    )
    for command in commands:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(command)
        captured = capsys.readouterr()
        assert exit.value.code == 2 and captured.out == ""
        assert "file/" in captured.err.splitlines()[-1] and "Traceback" not in captured.err


def test_another_optimizer_than_the_checkpoints_is_refused_and_nothing_written(
    fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in fitted.rglob("*")}
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last", "--model.optimizer.name", "muon"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and message.startswith(f"error: ckpt_path={fitted / 'last.ckpt'} ")
    assert "model.optimizer.name=adamw, and this run has muon; go on with adamw, or begin a run" in message
    assert {path: path.stat().st_mtime_ns for path in fitted.rglob("*")} == before


def test_optimizer_options_win_over_the_checkpoint(fitted: Path, tmp_path: Path) -> None:
    options = ["--model.optimizer.learning_rate", "0.002", "--model.optimizer.weight_decay", "0.5"]
    main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last", "--trainer.max_steps", "7", *options])
    checkpoint = Checkpoint.open(fitted / "last.ckpt").contents
    decayed, plain = checkpoint["optimizer_states"][0]["param_groups"]
    assert decayed["initial_lr"] == plain["initial_lr"] == 0.002
    assert decayed["weight_decay"] == 0.5 and plain["weight_decay"] == 0.0
    # The schedule ends at 6 steps in the checkpoint and at 7 now: at its end the rate is a tenth of the peak.
    assert checkpoint["lr_schedulers"][0]["_last_lr"] == pytest.approx([0.0002, 0.0002])


@pytest.mark.parametrize(
    "option, value", [("data.tokenizer", "bytes"), ("data.seed", "7"), ("data.val_fraction", "0.3")]
)
def test_another_split_or_tokenizer_than_the_checkpoints_is_refused(
    option: str, value: str, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "tiny.yaml", "--ckpt_path", str(fitted / "last.ckpt"), f"--{option}", value]
    for verb in ("fit", "validate") if option != "data.tokenizer" else ("fit", "validate", "predict"):
        with pytest.raises(SystemExit) as exit:
            main([verb, *words])
        assert exit.value.code == 2
        assert f"{option}={value} contradicts" in capsys.readouterr().err


def test_last_is_the_newest_of_the_runs_of_a_name(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", "tiny.yaml"])
    main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last", "--trainer.max_steps", "8"])
    assert Checkpoint.open(fitted.with_name("tiny-2") / "last.ckpt").step == 8
    assert Checkpoint.open(fitted / "last.ckpt").step == 6
    # Without a configuration, that of the newest run.
    main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "9"])
    assert Checkpoint.open(fitted.with_name("tiny-2") / "last.ckpt").step == 9


@pytest.mark.parametrize("prompt", ["# Title", "null", "12", "[1] The", "a: b", "The cat: "])
def test_a_prompt_is_taken_as_it_stands(prompt: str, fitted: Path) -> None:
    main(["predict", "--data.prompts", prompt, "--generation.max_new_tokens", "1"])
    (row,) = map(json.loads, (fitted / "predictions.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["prompt"] == prompt


def test_a_run_without_validation_saves_every_epoch(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = {"max_steps": -1, "max_epochs": 3, "val_check_interval": 1.0}
    checkpoint = {"monitor": None, "save_top_k": -1}
    config = tiny_config(data={"val_fraction": 0.0}, trainer=trainer, checkpoint=checkpoint)
    main(["fit", "--config", str(config)])
    assert len(list((tmp_path / "checkpoints" / "tiny").glob("step*.ckpt"))) == 3


def test_a_trial_run_validates_also_with_accumulation(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"accumulate_grad_batches": 4, "fast_dev_run": 4}
    main(["fit", "--config", str(tiny_config(trainer=settings))])
    assert "val/loss" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_weights_alone_do_not_resume(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(tiny_config(checkpoint={"save_weights_only": True}))
    main(["fit", "--config", config])
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", "8"])
    assert exit.value.code == 2
    assert "holds weights alone" in capsys.readouterr().err.splitlines()[-1]
    main(["validate", "--ckpt_path", str(tmp_path / "checkpoints" / "tiny" / "last.ckpt")])


def test_a_folder_for_checkpoints_is_not_written_over(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", str(tiny_config(checkpoint={"dirpath": "kept"}))]
    main(words)
    assert Checkpoint.open(tmp_path / "kept" / "last.ckpt").step == 6
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2 and sorted(tmp_path.rglob("*")) == before
    assert "error: checkpoint.dirpath=kept holds checkpoints" in capsys.readouterr().err
    main([*words, "--ckpt_path", "last", "--trainer.max_steps", "8"])
    assert Checkpoint.open(tmp_path / "kept" / "last.ckpt").step == 8
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["tiny"]


def test_a_rank_that_is_not_the_first_says_what_it_has_met(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", str(tiny_config()), "--data.batch_size", "0"])
    assert exit.value.code == 2
    assert "error of rank 1: data.batch_size=0 is below 1" in capsys.readouterr().err


def test_processes_may_be_spawned(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--trainer.strategy", "ddp_spawn", "--trainer.devices", "1", "--trainer.max_steps", "3"]
    main(["fit", "--config", str(tiny_config()), *words])
    assert Checkpoint.open(tmp_path / "checkpoints" / "tiny" / "last.ckpt").step == 3


def test_arguments_of_callbacks_win_over_the_checkpoint(
    fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopping = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    fit = ["fit", "--config", "tiny.yaml", "--run_name", "early", "--ckpt_path", "last", *stopping]
    for steps, words, patience in ((6, ["5"], 5), (9, ["8"], 8), (12, [], 8)):
        given = ["--trainer.callbacks.patience", *words] if words else []
        main([*fit, "--trainer.max_steps", str(steps), *given])
        states = Checkpoint.open(Path("checkpoints/early/last.ckpt")).contents["callbacks"]
        (state,) = [state for key, state in states.items() if key.startswith("EarlyStopping")]
        assert state["patience"] == patience
    assert "EarlyStopping.patience=8 as given, not 5 as in the checkpoint" in capsys.readouterr().err


def test_a_device_among_the_arguments_of_a_callback_is_saved_and_read_again(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    averaging = ["--trainer.callbacks", "StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.1"]
    averaging += ["--trainer.callbacks.swa_epoch_start", "100"]
    fit = ["fit", "--config", str(tiny_config()), "--run_name", "averaged"]
    main([*fit, "--trainer.max_steps", "2", *averaging])
    main(["fit", "--run_name", "averaged", "--ckpt_path", "last", "--trainer.max_steps", "4"])
    assert Checkpoint.open(Path("checkpoints/averaged/last.ckpt")).step == 4
    assert "Unable" not in Path("checkpoints/averaged/config.yaml").read_text()


def test_output_ends_no_run_and_files_keep_what_a_terminal_does_not_show(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ascii_only = io.TextIOWrapper(written := io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(ascii_only, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", ascii_only)
    main(["fit", "--config", str(tiny_config()), "--samples.prompts", '["从 \\e[2J"]'])
    assert "? \\x1b[2J" in written.getvalue().decode() and "\x1b" not in written.getvalue().decode()
    for stream in (ascii_only, None):
        monkeypatch.setattr(sys, "stdout", stream)
        output = f"{stream is None}.jsonl"
        main(["predict", "--data.prompts", '["从 \\e[2J"]', "--output", output])
        (row,) = map(json.loads, Path(output).read_text(encoding="utf-8").splitlines())
        assert row["prompt"] == "从 \x1b[2J"
    assert sys.stdout is None and "\x1b" not in written.getvalue().decode()


def test_a_run_that_is_at_or_beyond_its_last_step_says_so(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--config", str(tiny_config()), "--ckpt_path", "last"]
    main([*fit, "--trainer.max_steps", "4"])
    assert " is left" not in capsys.readouterr().err
    main([*fit, "--trainer.max_steps", "4"])
    said = capsys.readouterr().err
    assert "the run is at trainer.max_steps=4 already, and no step is left; raise it to go on" in said
    main([*fit, "--trainer.max_steps", "2"])
    assert "the run is at step 4, beyond trainer.max_steps=2; none is left" in capsys.readouterr().err
