"""Bad input: one clear line, exit code 2, nothing written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gpt_lightning.__main__ import main

Config = Callable[..., Path]


def fails(words: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """The message of a command that must fail with code 2 and leave `folder` as it was."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        main(words)
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) <= 4, captured.err
    assert "Traceback" not in captured.err
    assert sorted(folder.rglob("*")) == before
    return captured.err


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--model.config.n_layer", "3"], ["model.config.n_layer", "did you mean model.config.n_layers?"]),
        (["--model.n_layers", "3"], ["model.n_layers", "did you mean model.config.n_layers?"]),
        (["--trainer.max_step", "3"], ["trainer.max_step", "did you mean trainer.max_steps?"]),
        (["--model.config.n_layers", "three"], ["model.config.n_layers=three", "int"]),
        (["--model.config.d_model", "30", "--model.config.n_heads", "4"], ["d_model=30", "n_heads=4"]),
        (["--data.seq_len", "64"], ["data.seq_len=64", "max_position_embeddings=16"]),
        (["--data.train_files", '["nowhere.txt"]'], ["data.train_files", "nowhere.txt"]),
        (["--data.val_fraction", "1.5"], ["data.val_fraction=1.5"]),
        (["--data.batch_size", "0"], ["data.batch_size=0"]),
        (["--generation.temperature", "-1"], ["generation.temperature=-1.0"]),
        (["--generation.top_p", "0"], ["generation.top_p=0.0"]),
        (["--generation.top_p", "1.01"], ["generation.top_p=1.01"]),
        (["--model.optimizer.learning_rate", "-3"], ["model.optimizer.learning_rate=-3.0"]),
        (["--ckpt_path", "no/such.ckpt"], ["no/such.ckpt"]),
        (["--run_name", "a/b"], ["run_name='a/b'"]),
        (["--trainer.precision", "bf16-mix"], ["trainer.precision=bf16-mix", "bf16-mixed"]),
        (["--trainer.callbacks", "ModelCheckpont"], ["trainer.callbacks=ModelCheckpont", "class path"]),
    ],
)
def test_bad_options_of_fit(
    words: list[str],
    parts: list[str],
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config()
    message = fails(["fit", "--config", str(config), *words], capsys, tmp_path)
    assert all(part in message for part in parts), message


def test_misspelt_key_in_the_file(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(data={"seqlen": 16})
    message = fails(["fit", "--config", str(config)], capsys, tmp_path)
    assert "seqlen" in message and "did you mean data.seq_len?" in message


@pytest.mark.parametrize(
    "content, part",
    [(b"", "empty"), (b"too short", "seq_len"), (b"caf\xe9 " * 100, "UTF-8")],
)
def test_unusable_texts(
    content: bytes, part: str, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    config = tiny_config(data={"train_files": [str(text)], "val_fraction": 0.0})
    message = fails(["fit", "--config", str(config)], capsys, tmp_path)
    assert part in message and ("text.txt" in message or part == "seq_len"), message


def test_options_before_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(["--config", "x.yaml", "fit", "--print_config"], capsys, tmp_path)
    assert "before the verb" in message


def test_unknown_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean predict?" in fails(["predcit"], capsys, tmp_path)


@pytest.mark.parametrize("verb", ["predict", "validate", "test"])
def test_no_checkpoint_anywhere(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "fit" in fails([verb], capsys, tmp_path)


def test_a_file_that_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.ckpt"
    path.write_text("not a checkpoint")
    assert "notes.ckpt" in fails(["predict", "--ckpt_path", str(path)], capsys, tmp_path)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("data:\n  seq_len: 12\n  seq_len: 13\n", ["line 3", "seq_len stands twice"]),
        ("data:\n  seq_len: 12\n   bad: 1\n", ["line 3", "mapping values"]),
        ("model: {config: {n_layers: [\n", ["line 2"]),
    ],
)
def test_broken_config_files(
    text: str, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    message = fails(["fit", "--config", str(tmp_path / "broken.yaml")], capsys, tmp_path)
    assert all(part in message for part in ["broken.yaml", *parts]), message


def test_missing_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml" in fails(["fit", "--config", "nowhere.yaml"], capsys, tmp_path)
