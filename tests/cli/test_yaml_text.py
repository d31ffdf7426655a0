"""YAML that would grow without end is one line with its place; all other is read as it stands."""

import locale
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from gpt_lightning.__main__ import main
from gpt_lightning.cli.yaml_text import load_yaml, place_and_problem

Config = Callable[..., Path]
DEEP = "model:\n  config: " + "{a: " * 3000 + "1" + "}" * 3000
BLOCKS = "".join(f"{' ' * level}a:\n" for level in range(1500)) + " " * 1500 + "1"
LAUGHS = "".join(
    [
        "a0: &a0 [" + "x," * 9 + "]\n",
        *(f"a{n}: &a{n} [" + f"*a{n - 1}," * 9 + "]\n" for n in range(1, 10)),
    ]
)


@pytest.mark.parametrize(
    "text, problem, line",
    [
        (DEEP, "nested deeper than 100 levels", 2),
        (BLOCKS, "nested deeper than 100 levels", 101),
        (LAUGHS, "repeat more than 10,000 values", 5),
        ("a: &a\n  b: [" + "1, " * 100 + "*a]", "alias \\*a stands within itself", 2),
        ("a: &a {b: *a}", "alias \\*a stands within itself", 1),
        ("a: 1\nb:\n  c: 2\n  c: 3\n", "key c stands twice", 4),
    ],
)
def test_what_has_no_end_is_refused_at_its_line(text: str, problem: str, line: int) -> None:
    with pytest.raises(yaml.MarkedYAMLError, match=problem) as error:
        load_yaml(text)
    assert error.value.problem_mark is not None and error.value.problem_mark.line + 1 == line


@pytest.mark.parametrize("mistake", ["data:\n  seq_len:64\n  seed: 3\n", "data:\n\tseed: 8\n", "a\nb: 3\n"])
def test_a_mistake_has_the_same_words_in_a_long_text(mistake: str) -> None:
    said = []
    for text in (mistake, mistake + "# of a length from which another parser reads it\n" * 10):
        with pytest.raises(yaml.YAMLError) as error:
            load_yaml(text)
        said.append(place_and_problem(error.value, text))
    assert said[0] == said[1] and "mapping values" not in said[0]


def test_honest_texts_are_read() -> None:
    files = [f"file-{number}.txt" for number in range(20_000)]
    assert load_yaml(yaml.safe_dump({"train_files": files})) == {"train_files": files}
    text = "base: &base {a: 1, b: 2}\n" + "x: [*base, *base]\n" + " " * 200
    assert load_yaml(text)["x"][1] == {"a": 1, "b": 2}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quoted = yaml.safe_dump({"model": {"optimizer": {"matrix_learning_rate": LAUGHS}}})
    for name, text in (("deep", DEEP), ("laughs", LAUGHS), ("quoted", quoted)):
        Path(f"{name}.yaml").write_text(text)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config", "deep.yaml"], "--config deep.yaml, line 2: it is nested deeper"),
        (["--config", "laughs.yaml"], "--config laughs.yaml, line 5: its aliases repeat"),
        (["--model", "deep.yaml"], "'deep.yaml' - it is nested deeper"),
        (["--data", "laughs.yaml"], "'laughs.yaml' - its aliases repeat"),
        (["--trainer.callbacks", "laughs.yaml"], "trainer.callbacks="),
        (["--generation.stop", "[" * 3000 + "]" * 3000], "generation.stop='[[["),
        (["--samples.prompts", LAUGHS], "samples.prompts"),
        # An option that may be null is looked into by a reader of its own.
        ([f"--model.optimizer.matrix_learning_rate={LAUGHS}"], "matrix_learning_rate="),
        (["--config", "quoted.yaml"], "--config quoted.yaml: model: optimizer: matrix_learning_rate="),
    ],
)
def test_it_is_one_line_wherever_it_stands(
    words: list[str], message: str, files: None, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", str(tiny_config()), *words])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert exit.value.code == 2 and len(said) == 1 and message in said[0] and len(said[0]) < 500
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("run_name: 2001-13-13", "config.yaml: month must be in 1..12; mend the file"),
        ("? [a]\n: b", "config.yaml: unhashable type: 'list'; mend the file"),
        ("a: \x01", "config.yaml: unacceptable character #x0001"),
        ("a: !!python/object/apply:os.system [x]", "config.yaml, line 1: could not determine a constructor"),
        ('data: {cache_dir: "a\\0b"}', "data.cache_dir='a\\x00b' holds a null character; leave it out"),
        ("trainer:\n  # max_steps: 3", "config.yaml, line 1: trainer holds no options; indent some below"),
        ("# a\ndata:\n  seq_len 16", "config.yaml, line 3: 'seq_len 16': the option has no colon"),
        ("seq_len 16", "config.yaml, line 1: 'seq_len 16': the option has no colon after it; write it as"),
        ("# a\nseq_len", "config.yaml, line 2: 'seq_len': the option has no colon after it; write it as"),
        ("data:\n  seq_len:64\n", "config.yaml, line 2: 'seq_len:64': a blank is missing after the colon; w"),
        ("data:\n  seq_len:64\n\n  seed: 3", "config.yaml, line 2: a blank is missing after the colon; m"),
        ("data:\n  seed: 3\n  seq_len:64", "config.yaml, line 3: a blank is missing after the colon; mend"),
        ("model:\n  config:\n    d_ff:64", "config.yaml, line 3: 'd_ff:64': a blank is missing after the"),
        ("data:\n  train_files = a/*.txt", "config.yaml, line 2: 'train_files = a/*.txt': the option has ="),
        ("data:\n  text_key = a\n  seed: 3", "config.yaml, line 2: the option has = after it, and a colon"),
        ("data:\n  seq_len: 8\n  seed 3\n", "config.yaml, line 3: the option has no colon after it; mend"),
        ("data:\n  seq_len 8\n  seed: 3\n", "config.yaml, line 2: the option has no colon after it; mend"),
        ("data\n  seq_len: 8\n", "config.yaml, line 1: the option has no colon after it; mend the file"),
        ("data:\n\tseq_len: 8\n", "config.yaml, line 2: it has a tab where spaces are to be"),
        ("data:\n  seq_len: 8\n   seed: 3\n", "config.yaml, line 3: it is indented deeper than the line"),
        ("data:\n  seq_len: 8\n seed: 3\n", "config.yaml, line 3: it is not indented as the lines above it"),
        ("run_name: a: b\n", "config.yaml, line 1: it has a second colon; put the value into quotes"),
        ("data:\n  text_key: 'a\n  seed: 3\nrun_name: b\n", "config.yaml, line 2: a quote is opened and not"),
        ("data:\n  train_files: [a, b\n  seed: 3\n", "config.yaml, line 2: a bracket is opened and not"),
        ("run_name: a\ndata: {seed: 3", "config.yaml, line 2: a bracket is opened and not closed; mend"),
        ("data:\n  prompts: [\n    'a'\n    'b'\n  ]", "config.yaml, line 4: a comma is missing between"),
        ('data:\n  text_key: "a\nmodel:\nrun_name: "b"', "config.yaml, line 2: a quote is opened, and other"),
        ("run_name: 'it's'\n", "config.yaml, line 1: a quote is opened, and other text follows where it"),
        ("data:", "data holds no options"),
        ("data: 3", "data holds no options"),
        ("generation: !!binary aGVsbG8=", "generation holds no options"),
        ('data: {cache_dir: ""}', "data.cache_dir='' names nothing; give a name, or leave it out"),
        ('trainer: {default_root_dir: "a\\0b"}', "trainer.default_root_dir='a\\x00b' holds a null character"),
    ],
)
def test_values_that_nothing_reads_are_one_line(
    text: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", "config.yaml"])
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.fixture
def plain_locale() -> Iterator[None]:
    former = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    yield
    locale.setlocale(locale.LC_CTYPE, former)


@pytest.mark.skipif(bool(sys.flags.utf8_mode), reason="Python then reads all files in UTF-8")
def test_configuration_files_are_utf8_in_any_locale(
    plain_locale: None, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config()
    text = config.read_text(encoding="utf-8").replace("data:\n", "data:\n  document_separator: 从前\n")
    config.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", str(config), "--print_config"])
    assert exit.value.code == 0 and "document_separator: 从前" in capsys.readouterr().out
    assert locale.setlocale(locale.LC_CTYPE) == "C"
