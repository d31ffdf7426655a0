"""Holds the words that name no file to the run and the configuration that they mean."""

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpt_lightning.__main__ import main
from gpt_lightning.checkpoint.files import write
from gpt_lightning.cli.config_file import complete_words
from gpt_lightning.cli.recipes import give_way, name_of_run, with_recipe_names
from gpt_lightning.data.prompts import read_prompts
from gpt_lightning.exit_codes import UserError

SHIPPED = Path(__file__).parents[2] / "configs"


def save(path: Path, step: int = 3, **config: object) -> Path:
    """A checkpoint, and the configuration of the run that wrote it."""
    write({"global_step": step}, path)
    (path.parent / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def file_of(words: list[str]) -> str:
    return words[words.index("--config") + 1]


def completed(words: list[str]) -> list[str]:
    return complete_words(words)[0]


LAST = ["--ckpt_path", "last"]


@pytest.mark.parametrize(
    "words",
    [
        ["--run_name", "new", *LAST],
        ["--run_name=new", "--ckpt_path=last"],
        [*LAST, "--run_name", "new", "--trainer.default_root_dir", "."],
        [*LAST, "--checkpoint.dirpath", "elsewhere"],
        [*LAST, "--checkpoint", "{dirpath: elsewhere}"],
        [*LAST, "--run_name", "new", "--checkpoint.dirpath", "elsewhere"],
        [*LAST, "--run_name", "old", "--checkpoint.dirpath", "elsewhere"],
        [*LAST, "--run_name", "old", "--trainer.default_root_dir", "elsewhere"],
        [*LAST, "--run_name", "old", "--trainer", "{default_root_dir: elsewhere}"],
        ["--ckpt_path", "null"],
    ],
)
def test_a_named_run_that_has_no_checkpoint_begins(words: list[str]) -> None:
    save(Path("checkpoints/old/last.ckpt"))
    completed_words, beneath = complete_words(["fit", *words])
    assert beneath is not None and beneath.stem == "quickstart"
    assert completed_words[1:] == words


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_as_it_was_begun() -> None:
    for run, own in (("a", "kept"), ("b", None)):
        save(Path(f"checkpoints/{run}/last.ckpt"), checkpoint={"dirpath": own})
        Path(f"checkpoints/{run}/last.ckpt").unlink()
    words = completed(["fit", "--run_name", "b", *LAST])
    assert file_of(words) == "checkpoints/b/config.yaml" and words[3:7] == ["--run_name", "b", *LAST]
    words = ["--checkpoint.dirpath", "kept", *LAST]
    assert completed(["fit", *words]) == ["fit", "--config", "checkpoints/a/config.yaml", *words]


def test_the_last_of_a_named_run_is_its_own() -> None:
    for run in ("a", "b", "c-2"):
        save(Path(f"checkpoints/{run}/last.ckpt"))
    Path("checkpoints/c-2/.numbered").write_text("c")
    for name, folder in (("a", "a"), ("b", "b"), ("c", "c-2"), ("c-2", "c-2")):
        words = completed(["fit", "--run_name", name, *LAST])
        assert file_of(words) == f"checkpoints/{folder}/config.yaml"
        assert words[3:7] == ["--run_name", name, *LAST]  # which then finds the same one
    # Without a name it is the newest of all.
    assert completed(["fit", *LAST])[-2:] == ["--ckpt_path", "checkpoints/c-2/last.ckpt"]


def test_the_last_in_a_folder_of_its_own_has_the_configuration_of_its_run() -> None:
    for run, own in (("a", "kept"), ("b", "other"), ("c", None)):
        save(Path(f"checkpoints/{run}/old.ckpt"), checkpoint={"dirpath": own})
    write({"global_step": 7}, Path("kept/last.ckpt"))
    words = ["--checkpoint.dirpath", "kept", *LAST]
    assert file_of(completed(["fit", *words])) == "checkpoints/a/config.yaml"
    assert completed(["fit", *words])[3:] == words
    path = ["--ckpt_path", "kept/last.ckpt"]
    assert file_of(completed(["validate", *path])) == "checkpoints/a/config.yaml"
    with pytest.raises(ValueError, match="ckpt_path=other/last.ckpt has no config.yaml beside it"):
        Path("checkpoints/b/config.yaml").unlink()
        write({"global_step": 7}, Path("other/last.ckpt"))
        completed(["fit", "--ckpt_path", "other/last.ckpt"])


def test_a_run_that_is_named_is_the_one_that_is_judged() -> None:
    for run in ("a", "b"):
        save(Path(f"checkpoints/{run}/last.ckpt"))
    for verb in ("validate", "test", "predict"):
        words = completed([verb, "--run_name", "a"])
        assert words[-2:] == ["--ckpt_path", "checkpoints/a/last.ckpt"]
        with pytest.raises(ValueError, match="run_name=none has no checkpoint in checkpoints"):
            completed([verb, "--run_name", "none"])
    with pytest.raises(ValueError, match="run_name='../x' is not a plain folder name"):
        completed(["fit", "--run_name", "../x", *LAST])


def test_words_are_utf8_in_any_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python reads them where the locale is C: byte by byte."""
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    undecoded = "从前".encode().decode("ascii", "surrogateescape")
    for words in ([undecoded], [f'["{undecoded}"]']):
        assert json.loads(completed(["predict", "--data.prompts", *words])[-1]) == ["从前"]
    assert completed(["predict", f"--generation.stop={undecoded}"])[-1] == "--generation.stop=从前"
    assert completed(["predict", "--ckpt_path", undecoded])[-1] == undecoded  # which Python then opens
    assert read_prompts(undecoded, None) == ["从前"]


def test_a_fit_is_of_what_its_configuration_can_hold() -> None:
    for words in (["--data.train_files", "old\udcff.txt"], ["--data.train_files=old\udcff.txt"]):
        with pytest.raises(UserError, match=r"^data.train_files='old\\udcff.txt' is not UTF-8; rename"):
            completed(["fit", *words])
    save(Path("checkpoints/a/last.ckpt"))
    assert "old\udcff.txt" in completed(["validate", "--data.val_files", "old\udcff.txt"])


def test_recipes_go_by_their_names(tmp_path: Path) -> None:
    for given in ("shakespeare", "shakespeare.yaml", "configs/shakespeare.yaml"):
        assert Path(file_of(completed(["fit", "--config", given]))).samefile(SHIPPED / "shakespeare.yaml")
        assert completed(["fit", f"--config={given}"])[1] == f"--config={SHIPPED / 'shakespeare.yaml'}"
        for words in (["--config", given], [f"--config={given}"]):  # as a report shows them
            found = with_recipe_names(completed(["fit", *words, "--data.seq_len=64"]))
            assert "=".join(found[1:-1]) == "--config=shakespeare" and found[-1] == "--data.seq_len=64"
    Path("shakespeare").write_text("run_name: mine")  # a file comes first
    assert file_of(completed(["fit", "--config", "shakespeare"])) == "shakespeare"
    with pytest.raises(UserError, match=r"shakespear is neither .* \(did you mean shakespeare\?\); .*luxun"):
        completed(["fit", "--config", "shakespear"])
    with pytest.raises(UserError, match="--config other/shakespeare.yaml is neither a file"):
        completed(["fit", "--config", "other/shakespeare.yaml"])


def beneath(*words: str) -> str | None:
    found = complete_words([*words])[1]
    return None if found is None else found.stem


def test_what_is_not_said_is_the_quickstarts_or_the_fine_tunings() -> None:
    Path("mine.yaml").write_text("model: {config: {n_layers: 3}}")
    Path("theirs.yaml").write_text("init_from: gpt2")
    for words in ([], ["--config", "mine.yaml"], ["--config", "gpt2_small"], ["--help"]):
        assert beneath("fit", *words) == "quickstart"
    assert beneath("validate", "--config", "mine.yaml") == beneath("prepare") == "quickstart"
    for words in (["--init_from", "x"], ["--config", "theirs.yaml"], ["--config", "finetune_gpt2"]):
        assert beneath("fit", *words) == "finetune_gpt2"
    assert beneath("fit", "--config", "theirs.yaml", "--config", "mine.yaml") == "finetune_gpt2"
    assert beneath("fit", "--config", "theirs.yaml", "--init_from", "null") == "quickstart"


def test_a_configuration_that_says_everything_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """One of an earlier version knows no Muon, and is to go on without."""
    with pytest.raises(SystemExit):
        main(["fit", "--print_config"])
    whole = yaml.safe_load(capsys.readouterr().out)
    del whole["model"]["optimizer"]["name"]
    Path("whole.yaml").write_text(yaml.safe_dump(whole))
    assert beneath("fit", "--config", "whole.yaml") is None
    with pytest.raises(SystemExit):
        main(["fit", "--config", "whole.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["optimizer"]["name"] == "adamw"


def test_a_file_and_the_same_options_are_the_same_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("data: {batch_size: 3}\ntrainer: {max_epochs: 2}")
    printed = []
    for words in (["--config", "mine.yaml"], ["--data.batch_size", "3", "--trainer.max_epochs", "2"]):
        with pytest.raises(SystemExit):
            main(["fit", *words, "--print_config"])
        printed.append(yaml.safe_load(capsys.readouterr().out))
    assert printed[0] == printed[1]
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    help = " ".join(capsys.readouterr().out.split())
    quickstart = yaml.safe_load((SHIPPED / "quickstart.yaml").read_text())
    assert f"Width of the residual stream [{quickstart['model']['config']['d_model']}]" in help
    assert printed[0]["model"]["config"]["d_model"] == quickstart["model"]["config"]["d_model"]


def test_the_command_line_holds_over_files_wherever_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("data: {batch_size: 3, seq_len: 32}\ntrainer: {max_steps: 7}")
    Path("data.yaml").write_text("batch_size: 4\nseq_len: 48")
    options, files = ["--data.seq_len", "64", "--trainer.max_steps=2"], ["--data", "data.yaml"]
    printed = []
    for words in (
        ["--config", "mine.yaml", *files, *options],
        [*options, "--config", "mine.yaml", *files],
        [*files, "--data.seq_len=64", "--config=mine.yaml", "--trainer.max_steps", "2"],
    ):
        with pytest.raises(SystemExit):
            main(["fit", *words, "--print_config"])
        printed.append(yaml.safe_load(capsys.readouterr().out))
    assert printed[0] == printed[1] == printed[2]
    assert (printed[0]["data"]["batch_size"], printed[0]["data"]["seq_len"]) == (4, 64)
    assert printed[0]["trainer"]["max_steps"] == 2


@pytest.mark.parametrize(
    "given, steps, interval",
    [
        ({}, 2000, 400),
        ({"max_steps": 50}, 50, 50),
        ({"max_epochs": 2}, -1, None),
        ({"max_time": "01:00"}, -1, 400),
        ({"max_epochs": 2, "max_steps": 10, "val_check_interval": 7}, 10, 7),
        ({"check_val_every_n_epoch": 2}, 2000, None),
    ],
)
def test_the_recipes_end_gives_way(given: dict[str, Any], steps: int, interval: int | None) -> None:
    trainer = Namespace(max_epochs=None, max_time=None, max_steps=2000, val_check_interval=400)
    vars(trainer).update(given)
    give_way(Namespace(trainer=trainer), {f"trainer.{name}": value for name, value in given.items()})
    assert (trainer.max_steps, trainer.val_check_interval) == (steps, interval)


@pytest.mark.parametrize(
    "files, name",
    [
        (["python:docs"], "quickstart"),
        (None, "quickstart"),
        ("book.txt", "book"),
        (["letters.jsonl.gz", "book.txt"], "letters"),
        (["novels/*.txt"], "novels"),
        (["a/b/**/x?.txt"], "b"),
        (["texts"], "texts"),
        (["鲁迅.jsonl"], "鲁迅"),
        (["$HOME.txt"], "run"),
        (["*.txt"], None),
    ],
)
def test_a_run_is_named_after_its_text(files: Any, name: str | None, tmp_path: Path) -> None:
    settings = Namespace(run_name=None, config=None, data=Namespace(train_files=files, mixture=None))
    assert name_of_run(settings) == (name or tmp_path.name)
    assert name_of_run(Namespace(**{**vars(settings), "config": ["x/mine.yaml"]})) == "mine"
    assert name_of_run(Namespace(**{**vars(settings), "run_name": "given"})) == "given"


def test_generation_goes_by_short_names() -> None:
    words = ["predict", "--top-p", "0.99", "--temperature=0.9", "--do-sample", "--prompt", "To be"]
    assert completed(words)[1:] == [
        *("--generation.top_p", "0.99", "--generation.temperature=0.9", "--generation.do_sample=true"),
        *("--data.prompts", '["To be"]'),
    ]
