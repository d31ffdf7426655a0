"""Holds the words that name no file to the run and the configuration that they mean."""

import json
import os
from pathlib import Path

import pytest
import yaml

from gpt_lightning.checkpoint.files import write
from gpt_lightning.cli.config_file import complete_words
from gpt_lightning.data.prompts import read_prompts


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
    completed = complete_words(["fit", *words])
    assert Path(file_of(completed)).name == "quickstart.yaml"
    assert completed[3:] == words


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_as_it_was_begun() -> None:
    for run, own in (("a", "kept"), ("b", None)):
        save(Path(f"checkpoints/{run}/last.ckpt"), checkpoint={"dirpath": own})
        Path(f"checkpoints/{run}/last.ckpt").unlink()
    words = complete_words(["fit", "--run_name", "b", *LAST])
    assert file_of(words) == "checkpoints/b/config.yaml" and words[3:7] == ["--run_name", "b", *LAST]
    words = ["--checkpoint.dirpath", "kept", *LAST]
    assert complete_words(["fit", *words]) == ["fit", "--config", "checkpoints/a/config.yaml", *words]


def test_the_last_of_a_named_run_is_its_own() -> None:
    for run in ("a", "b", "c-2"):
        save(Path(f"checkpoints/{run}/last.ckpt"))
    Path("checkpoints/c-2/.numbered").write_text("c")
    for name, folder in (("a", "a"), ("b", "b"), ("c", "c-2"), ("c-2", "c-2")):
        words = complete_words(["fit", "--run_name", name, *LAST])
        assert file_of(words) == f"checkpoints/{folder}/config.yaml"
        assert words[3:7] == ["--run_name", name, *LAST]  # which then finds the same one
    # Without a name it is the newest of all.
    assert complete_words(["fit", *LAST])[-2:] == ["--ckpt_path", "checkpoints/c-2/last.ckpt"]


def test_the_last_in_a_folder_of_its_own_has_the_configuration_of_its_run() -> None:
    for run, own in (("a", "kept"), ("b", "other"), ("c", None)):
        save(Path(f"checkpoints/{run}/old.ckpt"), checkpoint={"dirpath": own})
    write({"global_step": 7}, Path("kept/last.ckpt"))
    words = ["--checkpoint.dirpath", "kept", *LAST]
    assert file_of(complete_words(["fit", *words])) == "checkpoints/a/config.yaml"
    assert complete_words(["fit", *words])[3:] == words
    path = ["--ckpt_path", "kept/last.ckpt"]
    assert file_of(complete_words(["validate", *path])) == "checkpoints/a/config.yaml"
    with pytest.raises(ValueError, match="ckpt_path=other/last.ckpt has no config.yaml beside it"):
        Path("checkpoints/b/config.yaml").unlink()
        write({"global_step": 7}, Path("other/last.ckpt"))
        complete_words(["fit", "--ckpt_path", "other/last.ckpt"])


def test_a_run_that_is_named_is_the_one_that_is_judged() -> None:
    for run in ("a", "b"):
        save(Path(f"checkpoints/{run}/last.ckpt"))
    for verb in ("validate", "test", "predict"):
        words = complete_words([verb, "--run_name", "a"])
        assert words[-2:] == ["--ckpt_path", "checkpoints/a/last.ckpt"]
        with pytest.raises(ValueError, match="run_name=none has no checkpoint in checkpoints"):
            complete_words([verb, "--run_name", "none"])
    with pytest.raises(ValueError, match="run_name='../x' is not a plain folder name"):
        complete_words(["fit", "--run_name", "../x", *LAST])


def test_words_are_utf8_in_any_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python reads them where the locale is C: byte by byte."""
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    undecoded = "从前".encode().decode("ascii", "surrogateescape")
    for words in ([undecoded], [f'["{undecoded}"]']):
        assert json.loads(complete_words(["predict", "--data.prompts", *words])[-1]) == ["从前"]
    assert complete_words(["predict", f"--generation.stop={undecoded}"])[-1] == "--generation.stop=从前"
    assert complete_words(["predict", "--ckpt_path", undecoded])[-1] == undecoded  # which Python then opens
    assert read_prompts(undecoded, None) == ["从前"]
