"""Checks that bad input gives one clear line and exit code 2, and that nothing is written."""

import errno
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from tokenizers import Tokenizer, models, pre_tokenizers

from gpt_lightning.__main__ import main
from gpt_lightning.callbacks.finite_guard import NonFiniteError
from gpt_lightning.callbacks.orderly_stop import Stopped
from gpt_lightning.checkpoint.atomic import naming
from gpt_lightning.checkpoint.files import CheckpointWriteError, NonFiniteCheckpointError
from gpt_lightning.cli.errors import one_line_errors, quiet
from gpt_lightning.exit_codes import UserError
from tests.log import since_start

Config = Callable[..., Path]


def fails(words: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """The message of a command that must fail with code 2 and leave `folder` as it was."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        main(words)
    captured = capsys.readouterr()
    message = since_start(captured.err)
    assert exit.value.code == 2
    assert captured.out == ""
    assert len(message.strip().splitlines()) <= 4, message
    assert "Traceback" not in message
    assert sorted(folder.rglob("*")) == before
    return message


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--model.config.n_layer", "3"], ["model.config.n_layer", "did you mean --model.config.n_layers?"]),
        (["--model.n_layers", "3"], ["model.n_layers", "did you mean --model.config.n_layers?"]),
        (["--trainer.max_step", "3"], ["trainer.max_step", "did you mean --trainer.max_steps?"]),
        (["--model.optimizer.lr", "3"], ["did you mean --model.optimizer.learning_rate?"]),
        (["--n-embd", "3"], ["did you mean --model.config.d_model?"]),
        (["--seed=3"], ["did you mean --seed_everything?"]),
        (
            ["--lr", "3", "--n-embd", "3"],
            ["--model.optimizer.learning_rate (--lr), --model.config.d_model (--n-embd)?"],
        ),
        (["tiny.yaml"], ["the text is --data.train_files tiny.yaml"]),
        (["--data", "corpus.jsonl"], ["--data corpus.jsonl is a text", "--data.train_files corpus.jsonl"]),
        (["--data=."], ["--data . is a text", "write --data.train_files ."]),
        (["--data", '["a b.txt"]'], ["is neither a file of options", """--data.train_files '["a b.txt"]'"""]),
        (["--trainer", "4"], ["trainer=4 is neither a file of options nor {option: value}"]),
        (["--data.mixture", "[a.txt, b.txt]"], ["data.mixture=['a.txt', 'b.txt']", "[{name: novels, files:"]),
        (
            ["--data.mixture", "[{name: a, files: a.txt, weight: high}]"],
            ["weight=high does not fit; give a number, or {step: number}"],
        ),
        (["--data.mixture.0.weight", "3"], ["0.weight is of one item of a list; give the whole list"]),
        (["shakespeare"], ["a recipe, or a file of options, is --config shakespeare"]),
        (["--model.config.n_layers", "three"], ["model.config.n_layers=three", "int"]),
        (["--model.config.d_model", "30", "--model.config.n_heads", "4"], ["d_model=30", "n_heads=4"]),
        (["--data.seq_len", "64"], ["data.seq_len=64", "max_position_embeddings=16"]),
        (["--data.train_files", '["nowhere.txt"]'], ["data.train_files", "nowhere.txt"]),
        (["--data.val_fraction", "1.5"], ["data.val_fraction=1.5"]),
        (["--data.batch_size", "0"], ["data.batch_size=0"]),
        (["--generation.temperature", "-1"], ["generation.temperature=-1.0"]),
        (["--generation.top_p", "-0.5"], ["generation.top_p=-0.5"]),
        (["--generation.top_p", "1.01"], ["generation.top_p=1.01"]),
        (["--model.optimizer.learning_rate", "-3"], ["model.optimizer.learning_rate=-3.0"]),
        (["--ckpt_path", "no/such.ckpt"], ["no/such.ckpt"]),
        (["--init_from", "resume"], ["init_from=resume names no model", "give --ckpt_path last"]),
        (["--init_from=scratch"], ["init_from=scratch names no model", "leave it out"]),
        (["--run_name", "a/b"], ["run_name='a/b'"]),
        (
            ["--trainer.val_check_interval", "00:00:01:00", "--trainer.accumulate_grad_batches", "2"],
            ["trainer.val_check_interval=00:00:01:00", "trainer.accumulate_grad_batches=2"],
        ),
        (["--trainer.precision", "bf16-mix"], ["trainer.precision=bf16-mix", "bf16-mixed"]),
        (["--trainer.devices", "99"], ["trainer.devices=99 is over", "cores"]),
        (["--trainer.devices", "99", "--trainer.accelerator", "auto"], ["trainer.devices=99 is over"]),
        (["--trainer.devices", "0"], ["trainer.devices=0 is below 1"]),
        (["--trainer.accumulate_grad_batches", "0"], ["trainer.accumulate_grad_batches=0 is below 1"]),
        (["--trainer.accumulate_grad_batches", "-1"], ["trainer.accumulate_grad_batches=-1 is below 1"]),
        (["--trainer.log_every_n_steps", "-1"], ["trainer.log_every_n_steps=-1 is below 1"]),
        (["--trainer.gradient_clip_val", "-1"], ["trainer.gradient_clip_val=-1"]),
        (["--trainer.val_check_interval", "0"], ["trainer.val_check_interval=0 is below 1"]),
        (["--generation.top_k", "few"], ["generation.top_k=few does not fit; give int, null"]),
        (["--trainer.max_steps", "1.5"], ["trainer.max_steps=1.5", "int"]),
        (["--model.config.d_model", "-4"], ["model.config.d_model=-4"]),
        (["--data.seq_len", "-8"], ["data.seq_len=-8 is below 1"]),
        (["--data.num_workers", "-1"], ["data.num_workers=-1"]),
        (["--data.seed", "-1"], ["data.seed=-1"]),
        (["--data.tokenizer", "no/such/folder"], ["data.tokenizer=no/such/folder is not a folder"]),
        (["--data.val_files", '["nowhere.txt"]'], ["data.val_files", "nowhere.txt"]),
        (["--seed_everything", "-1"], ["seed_everything=-1 is not in"]),
        (["--weights_only", "false"], ["weights_only=False"]),
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


def test_all_wrong_names_and_kinds_are_told_at_once(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those of a file; what is within a wrong option, as a class's arguments, is not judged alone."""
    monkeypatch.chdir(tmp_path)
    config = str(tiny_config(trainer={"max_steps": "x", "val_chek_interval": 3}, data={"odd": 4}))
    wrong = ["--trainer.callbacks=Nothing", "--trainer.callbacks.monitor=x", "--data.seq_len=y"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", config, "--data.batch_size", "z", *wrong, "--print_config"])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and not (tmp_path / "checkpoints").exists()
    lines = [line.partition(" does not fit")[0] for line in said.err.splitlines()]
    assert sorted(lines) == [
        "did you mean trainer.val_check_interval?",
        "error: Group 'data' does not accept option 'odd'",
        "error: Group 'trainer' does not accept option 'val_chek_interval'",
        *("error: data.batch_size=z", "error: data.seq_len=y"),
        *("error: trainer.callbacks=Nothing", "error: trainer.max_steps=x", "try: gpt-lightning fit --help"),
    ]
    assert lines[-1].startswith("try: ")


def test_all_options_that_stand_in_no_group_are_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("flat.yaml").write_text("train_files: [a.txt]\nmax_steps: 3\ndata:\n  seq_len: x\n")
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "flat.yaml"])
    lines = [line for line in since_start(capsys.readouterr().err).splitlines() if line[:3] != "try"]
    assert ended.value.code == 2 and sorted(lines) == [
        *("did you mean data.train_files?", "did you mean trainer.max_steps?"),
        *("error: Option 'max_steps' is not accepted", "error: Option 'train_files' is not accepted"),
        "error: data.seq_len=x does not fit; give int",
    ]


@pytest.mark.parametrize("shows", ["--print_config", "--help", "-h"])
def test_what_else_is_wrong_is_looked_for_without_showing_anything(
    shows: str, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["--data.seq_len", "x", shows, "--trainer.max_steps", "y"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(tiny_config()), *wrong])
    said, line = capsys.readouterr(), "error: {} does not fit; give int\n"
    both = line.format("data.seq_len=x") + line.format("trainer.max_steps=y")
    assert (ended.value.code, said.out, said.err) == (2, "", both + "try: gpt-lightning fit --help\n")


def test_the_first_mistake_is_told_whatever_comes_of_looking_for_others(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gpt_lightning.cli.parser.without_option", lambda words, key: words[len(words)])
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(tiny_config()), "--data.seq_len", "x"])
    assert ended.value.code == 2
    line = "error: data.seq_len=x does not fit; give int"
    assert capsys.readouterr().err.endswith(f"{line}\ntry: gpt-lightning fit --help\n")


@pytest.mark.parametrize("option", ["--data.train_files", "--data.val_files"])
def test_a_pattern_that_the_shell_has_made_words_of_is_to_be_quoted(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder := tmp_path / "鲁迅").mkdir()
    files = [f"{folder.name}/{name}.txt" for name in "abc"]
    for file in files:
        Path(file).touch()
    message = fails(["prepare", option, *files], capsys, tmp_path)
    assert f"quote a pattern, {option} '鲁迅/*.txt', or name the folder, {option} '鲁迅'" in message


def test_a_callback_that_is_added_to_itself(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    twice = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"] * 2
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(tiny_config()), *twice])
    message = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and not (tmp_path / "checkpoints").exists()
    assert "trainer.callbacks: " in message and "EarlyStopping" in message and "name each once" in message


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"decay": 2}, "EMAWeightAveraging does not take its arguments: Invalid decay value 2.0"),
        ({"update_every_n_steps": 0}, "EMAWeightAveraging.update_every_n_steps=0 averages nothing"),
        ({"update_starting_at_step": 6}, "update_starting_at_step=6 is not below trainer.max_steps=6"),
    ],
)
def test_a_callback_whose_arguments_cannot_be(
    arguments: dict[str, int],
    said: str,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    averaging = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": arguments}
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(tiny_config()), "--trainer.callbacks", json.dumps([averaging])])
    message = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and not (tmp_path / "checkpoints").exists()
    assert said in message


def test_misspelt_key_in_the_file(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(data={"seqlen": 16})
    message = fails(["fit", "--config", str(config)], capsys, tmp_path)
    assert "seqlen" in message and "did you mean data.seq_len?" in message


@pytest.mark.parametrize("stopping", [False, True])
def test_bits_per_byte_of_lost_text_cannot_be_monitored(
    stopping: bool, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    config = str(tiny_config(data={"tokenizer": str(tmp_path / "words")}))
    main(["prepare", "--config", config])
    capsys.readouterr()
    options = ["--checkpoint.monitor", "val/bpb"]
    if stopping:
        options = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/bpb"]
    message = fails(["fit", "--config", config, *options], capsys, tmp_path)
    assert "monitors val/bpb, which is not shown as the tokenizer loses text; monitor val/loss" in message


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
    assert "did you mean generate?" in fails(["chat"], capsys, tmp_path)


@pytest.mark.parametrize("verb", ["predict", "validate", "test"])
def test_no_checkpoint_anywhere(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "fit" in fails([verb], capsys, tmp_path)


def test_a_checkpoint_in_a_folder_whose_name_is_not_utf8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "\udce9").mkdir()
    path = tmp_path / "\udce9" / "last.ckpt"
    torch.save({"global_step": 3}, tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt").rename(path)
    message = fails(["predict", "--data.prompts", "The", "--ckpt_path", str(path)], capsys, tmp_path)
    assert "\\udce9/last.ckpt has a name that is not UTF-8; rename it, or call the program from" in message


def test_a_file_that_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.ckpt"
    path.write_text("not a checkpoint")
    assert "notes.ckpt" in fails(["predict", "--ckpt_path", str(path)], capsys, tmp_path)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("data:\n  seq_len: 12\n  seq_len: 13\n", ["line 3", "seq_len stands twice"]),
        ("data:\n  seq_len: 12\n   bad: 1\n", ["line 3", "indented deeper"]),
        ("model: {config: {n_layers: [\n", ["line 2"]),
    ],
)
def test_broken_config_files(
    text: str, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    message = fails(["fit", "--config", str(tmp_path / "broken.yaml")], capsys, tmp_path)
    assert all(part in message for part in ["broken.yaml", *parts]), message


@pytest.mark.slow
def test_texts_that_changed_since_the_checkpoint(
    tiny_config: Config,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    resume = ["fit", "--config", str(tiny_config()), "--ckpt_path", "last", "--trainer.max_steps", "7"]
    main(resume[:3])
    text = corpus.read_text()
    corpus.write_text(text.replace("cat", "cow"))
    capsys.readouterr()
    message = fails([*resume, "--run_name", "tiny"], capsys, tmp_path)
    assert "data.train_files: corpus.jsonl has changed since the checkpoint was saved" in message
    main(["validate", "--ckpt_path", "checkpoints/tiny/last.ckpt"])
    assert "warning: data.train_files: corpus.jsonl has changed" in capsys.readouterr().err
    corpus.write_text(text)
    main(resume)
    assert "has changed" not in capsys.readouterr().err


@pytest.mark.slow
def test_predict_takes_or_refuses_any_input(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(tiny_config())])
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    capsys.readouterr()
    refused = {
        ("--generation.temperature", "-1"): "generation.temperature=-1.0",
        ("--generation.temperature", "nan"): "generation.temperature=nan",
        ("--generation.top_k", "-1"): "generation.top_k=-1",
        ("--generation.top_p", "-1"): "generation.top_p=-1.0",
        ("--generation.max_new_tokens", "0"): "generation.max_new_tokens=0",
        ("--data.prompts_file", "latin.txt"): "data.prompts_file=latin.txt is not UTF-8 at byte 3",
        ("--data.prompts_file", "none.txt"): "data.prompts_file=none.txt does not exist",
        ("--data.prompts", "caf\udce9"): "caf\\udce9\"]' is not UTF-8",
        ("--model.config.d_model", "32"): "model.config.d_model=32 contradicts",
    }
    for words, part in refused.items():
        assert part in fails(["predict", *words], capsys, tmp_path)
    taken: tuple[list[str], ...] = (
        ["--data.prompts", ""],
        ["--data.prompts", "the cat sees " * 40],  # longer than the context
        ["--generation.temperature", "0"],
        ["--generation.top_k", "100000"],
        ["--generation.seed", "5"],
    )
    for words in taken:
        texts = []
        for _ in range(2):
            main(["predict", *words])
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1], words


def test_missing_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml" in fails(["fit", "--config", "nowhere.yaml"], capsys, tmp_path)


@pytest.mark.parametrize(
    "words, function",
    [
        (["fit"], "data.text_source.prepare_tokens"),
        (["prepare"], "data.corpus.plan_split"),
        (["predict", "--ckpt_path", "a.ckpt"], "cli.origin.find_checkpoint"),
        (["generate", "--prompt", "A", "--ckpt_path", "a.ckpt"], "cli.model_options.load_model"),
        (["consolidate", "--ckpt_path", "a.ckpt", "--output", "b.ckpt"], "cli.convert.consolidate"),
        (["import-hf", "gpt2", "b.ckpt"], "cli.convert.import_model"),
    ],
)
def test_a_value_error_of_our_own_code_shows_its_traceback(
    words: list[str], function: str, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*args: object, **options: object) -> None:
        int("x")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"gpt_lightning.{function}", faulty)
    config = ["--config", str(tiny_config())] if words[0] in ("fit", "prepare") else []
    with pytest.raises(ValueError, match="invalid literal for int"):  # which Python shows, and exits with 1
        main([*words, *config])


class Coded(Exception):
    exit_code = 5


def raised(error: Exception, cause: Exception | None = None) -> Callable[[], None]:
    def function() -> None:
        raise error from cause

    return function


@pytest.mark.parametrize(
    "error, cause, line, code",
    [
        (UserError("n=0 is below 1;\n raise it"), None, "error: n=0 is below 1; raise it", 2),
        (RuntimeError("a step failed"), UserError("n=0 is below 1"), "error: n=0 is below 1", 2),
        (Coded("no room (checkpoint.dirpath)"), None, "error: no room", 5),
        (PermissionError(13, "Permission denied", "/x"), None, "error: /x: Permission denied; name a", 2),
        (Stopped("stopped at step 5", 143), None, "stopped at step 5", 143),
        (NonFiniteError("loss is nan"), None, "error: loss is nan", 3),
        (NonFiniteCheckpointError("w"), None, "error: w holds NaN", 3),
        (CheckpointWriteError("a.ckpt: no room"), None, "error: a.ckpt: no room", 5),
        (ValueError("you tried to log"), OSError(28, "No space"), "error: [Errno 28] No space; make", 5),
        (RuntimeError("can't start new thread"), None, "error: can't start new thread; end other", 5),
    ],
)
def test_a_known_error_is_one_line_and_a_code(
    error: Exception, cause: Exception | None, line: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit, one_line_errors():
        raised(error, cause)()
    assert exit.value.code == code
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


def test_a_rank_says_which_it_is_and_one_process_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, start in ((0, "error: "), (3, "error of rank 3: ")):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        with pytest.raises(SystemExit), one_line_errors(is_run=True):
            raise CheckpointWriteError("no room (checkpoint.dirpath)")
        assert capsys.readouterr().err == f"{start}no room (checkpoint.dirpath)\n"


def test_an_interrupt_ends_with_its_code() -> None:
    for interrupted in (True, False):
        with pytest.raises(SystemExit) as exit, one_line_errors():
            try:
                raise KeyboardInterrupt if interrupted else OSError
            except (KeyboardInterrupt, OSError):
                sys.exit(1)  # as Lightning does
        assert exit.value.code == (130 if interrupted else 1)
    with pytest.raises(SystemExit) as exit, one_line_errors():
        raise KeyboardInterrupt
    assert exit.value.code == 130


@pytest.mark.parametrize("error", [RuntimeError("x"), OSError(5, "Input/output error"), KeyError("x")])
def test_a_fault_passes(error: Exception) -> None:
    with pytest.raises(type(error)), one_line_errors():
        raise error


@pytest.mark.parametrize(
    "option, said",
    [
        ("--trainer.default_root_dir", "trainer.default_root_dir: {place}/checkpoints"),
        ("--checkpoint.dirpath", "checkpoint.dirpath={place}"),
        ("--data.cache_dir", "data.cache_dir={place}"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_by_its_option(
    option: str, said: str, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    place = str(tmp_path / "file" / "x")
    words = ["fit", "--config", str(tiny_config()), option, place]
    message = fails(words, capsys, tmp_path)
    problem = f"{said.format(place=place)} cannot be written (Not a directory: {place}"
    assert message.startswith(f"error: {problem}")
    with pytest.raises(UserError, match="^theirs$"), naming("mine"):
        try:
            raise OSError(errno.EACCES, "no")
        except OSError as error:
            raise UserError("theirs") from error
    with pytest.raises(OSError, match="full"), naming("mine"):
        raise OSError(errno.ENOSPC, "full")


def test_a_warning_is_a_line_without_the_place_in_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # to be given back
    quiet()
    for number, warn in enumerate((warnings.warn, rank_zero_warn, logging.getLogger("torch").warning)):
        warn(f"it is\n  slow {number} (Triggered internally at /pytorch/a.cpp:49.)")
    assert capsys.readouterr().err == "".join(f"warning: it is slow {number}\n" for number in range(3))
