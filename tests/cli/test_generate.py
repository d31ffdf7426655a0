"""Holds `generate` to the text of predict, as it is drawn; to prompts and commands in a row; to signals."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import lightning
import pytest
import torch

from gpt_lightning.__main__ import main
from gpt_lightning.checkpoint.files import write
from gpt_lightning.cli.model_options import choose_device
from gpt_lightning.cli.repl import with_setting
from gpt_lightning.data.tokenizer import TextTokenizer, train_bpe
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel

TEXTS = ["从前有一个国王。👍🏽 naïve e\u0301 The cat sees the dog.\n"] * 4
Run = Callable[..., tuple[str, str, int]]


def write_checkpoint(path: Path) -> TextTokenizer:
    """Of a model that has learnt nothing and therefore writes everything."""
    tokenizer = train_bpe(TEXTS, 330)
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=32, n_layers=2, n_heads=2, d_model=16
    )
    weights = {f"model.{name}": tensor for name, tensor in GPTModel(config).state_dict().items()}
    position = {"consumed_samples": 0, "batches": 0, "epoch_batches": 0}
    data = {**position, "tokenizer": tokenizer.state, "settings": {"tokenizer": "bpe:330"}, "text": {}}
    path.parent.mkdir(parents=True)
    contents = {"state_dict": weights, "gpt_config": asdict(config), "TextDataModule": data}
    write({**contents, "pytorch-lightning_version": lightning.__version__, "global_step": 0}, path)
    return tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoints" / "run" / "last.ckpt"
    write_checkpoint(path)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Output, messages and exit code of a command, with these bytes on its standard input."""

    def run(*words: str, stdin: bytes = b"") -> tuple[str, str, int]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), newline="\n"))
        code = 0
        capsys.readouterr()
        try:
            main(["generate", "--device", "cpu", *words])
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
        captured = capsys.readouterr()
        return captured.out, captured.err, code

    return run


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["The cat", "", "从前", "naïve e\u0301 👍🏽"])
@pytest.mark.parametrize("stop", [[], ["e"], ["a\n", "一个"]])
def test_the_text_is_that_of_predict(checkpoint: Path, run: Run, prompt: str, stop: list[str]) -> None:
    prompts, stops = (json.dumps(texts, ensure_ascii=False) for texts in ([prompt], stop))
    settings = ["--generation.temperature", "3", "--generation.max_new_tokens", "60"]
    settings += ["--generation.stop", stops]
    main(["predict", "--ckpt_path", str(checkpoint), "--data.prompts", prompts, *settings])
    (row,) = map(json.loads, (checkpoint.parent / "predictions.jsonl").read_text("utf-8").splitlines())
    text, messages, code = run("--prompt", prompt, *settings)
    assert text == row["prompt"] + row["completion"] + "\n" and code == 0
    tokens, reason = row["completion_tokens"], {"length": "its length", "stop": "a stop string"}
    assert re.search(rf"^{tokens} tokens? in .* s(: .* tokens/s)?; ended by ", messages, re.MULTILINE)
    assert reason.get(row["finish_reason"], "the end of the document") in messages


def test_a_refusal_has_a_line_of_its_own(checkpoint: Path, run: Run) -> None:
    contents = torch.load(checkpoint, weights_only=True)
    contents["state_dict"]["model.ln_f.weight"][3] = torch.nan
    torch.save(contents, checkpoint)
    text, messages, code = run("--prompt", "The cat")
    assert text == "The cat\n" and code == 2
    assert messages.splitlines()[-1].startswith("error: the model's logits are not finite: its weights")


def test_special_tokens_are_parsed_where_it_is_said(checkpoint: Path, run: Run) -> None:
    prompt = "The<|endoftext|>"
    settings = ["--generation.max_new_tokens", "20", "--generation.temperature", "3"]
    predict = ["predict", "--ckpt_path", str(checkpoint), "--data.prompts", json.dumps([prompt]), *settings]
    found = {}
    for parses in ("false", "true"):
        text, said, _ = run("--prompt", prompt, *settings, "--parse_special_tokens", parses)
        hint = "a prompt holds '<|endoftext|>', which is read as text; with --parse_special_tokens true it is"
        assert (hint in said) is (parses == "false")
        main([*predict, "--data.parse_special_tokens", parses, "--output", f"{parses}.jsonl"])
        row = json.loads(Path(f"{parses}.jsonl").read_text())
        assert text == prompt + row["completion"] + "\n" and row["prompt"] == prompt
        found[parses] = (row["prompt_tokens"], row["completion"])
    assert found["true"][0] < found["false"][0] and found["true"][1] != found["false"][1]


def test_predict_hints_once_at_special_tokens(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for prompts, lines in ((["a<|endoftext|>", "<|endoftext|>"], 1), (["a"], 0)):
        main(["predict", "--ckpt_path", str(checkpoint), "--data.prompts", json.dumps(prompts)])
        assert capsys.readouterr().err.count("with data.parse_special_tokens true it is that token") == lines


def test_several_samples_come_one_after_the_other(checkpoint: Path, run: Run) -> None:
    settings = ["--generation.temperature", "3", "--generation.max_new_tokens", "9"]
    settings += ["--generation.stop", '["e"]']
    first, _, _ = run("--prompt", "The", *settings)
    three, messages, _ = run("--prompt", "The", *settings, "--generation.num_samples", "3")
    assert three.startswith(first) and len(three) > len(first)
    assert [f"sample {n} of 3: " in messages for n in (1, 2, 3)] == [True] * 3
    assert re.search(r"^\d+ tokens in .* tokens/s$", messages, re.MULTILINE)


@pytest.mark.parametrize("prompt", ["null", "5", '["a"]', "-x", "{}", "- a list", " ", "--x y"])
def test_a_prompt_is_a_text_whatever_it_looks_like(checkpoint: Path, run: Run, prompt: str) -> None:
    word = [f"--prompt={prompt}"] if prompt.startswith("--") else ["--prompt", prompt]
    text, messages, code = run(*word, "--generation.max_new_tokens", "1")
    assert text.startswith(prompt) and code == 0, messages


def test_a_dash_reads_the_prompt_from_standard_input(checkpoint: Path, run: Run) -> None:
    prompt = "从前\n有\n"
    text, _, _ = run("--prompt", "-", "--generation.max_new_tokens", "1", stdin=f"\ufeff{prompt}\n".encode())
    assert text.startswith(prompt)


def test_the_newlines_of_windows_are_no_part_of_a_prompt(checkpoint: Path, run: Run) -> None:
    settings = ["--generation.max_new_tokens", "2"]
    for lines in ("The cat\nThe", "The cat\nThe\n", "The cat\n/quit\nThe\n"):
        expected, _, _ = run(*settings, stdin=lines.encode())
        text, messages, code = run(*settings, stdin=lines.replace("\n", "\r\n").encode())
        assert text == expected and code == 0 and "error" not in messages
    whole = "A line\nand more\n"
    expected, _, _ = run("--prompt", "-", *settings, stdin=whole.encode())
    assert run("--prompt", "-", *settings, stdin=whole.replace("\n", "\r\n").encode())[0] == expected
    assert run("--prompt", "a\rb", *settings)[0].startswith("a\rb")  # which is nobody's newline


def test_a_terminal_gets_no_escapes_of_a_prompt(
    checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    settings = ["--prompt", "The\x1b[2J\tcat", "--generation.max_new_tokens", "1"]
    run(*settings)
    assert screen.getvalue().startswith("The\x1b[2J\tcat")  # a file
    monkeypatch.setattr(screen, "isatty", lambda: True)
    screen.truncate(screen.seek(0))
    run(*settings)
    assert screen.getvalue().startswith("The\\x1b[2J\tcat")


def test_bfloat16_writes_a_text_too(checkpoint: Path, run: Run) -> None:
    text, messages, code = run("--prompt", "The", "--precision", "bfloat16")
    assert text.startswith("The") and "128 tokens in" in messages and code == 0


def test_lines_are_prompts_and_commands(checkpoint: Path, run: Run) -> None:
    lines = "The\r\n\n/set max_new_tokens 2\n/set generation.stop [\"\\n\"]\n/settings\nThe\n/again\n//usr"
    text, messages, code = run("--generation.max_new_tokens", "3", stdin=lines.encode())
    assert code == 0
    assert messages.count("3 tokens in") == 2
    assert "max_new_tokens 2\n" in messages and 'stop ["\\n"]\n' in messages and "top_p 1.0\n" in messages
    assert "seed 43\n" in messages
    assert "/usr" in text and "//usr" not in text
    alone, _, _ = run("--generation.max_new_tokens", "3", stdin=b"The\n")
    assert text.startswith(alone)


def test_quit_ends_before_the_last_line(checkpoint: Path, run: Run) -> None:
    text, _, code = run(stdin=b"/quit\nThe\n")
    assert (text, code) == ("", 0)


@pytest.mark.parametrize(
    "line, message",
    [
        ("/set temperature -1", "generation.temperature=-1.0 is below 0"),
        ("/set temperature hot", "generation.temperature=hot does not fit; give float"),
        ("/set temperature", "/set temperature has no value; write /set NAME VALUE"),
        ("/set", "/set is no setting; write /set NAME VALUE"),
        ("/set temprature 1", "/set temprature is no setting; did you mean temperature?"),
        ("/set temp 1", "/set temp is no setting; did you mean temperature?"),
        ("/set top 1", "/set top is no setting; did you mean top_k or top_p or top_logprobs?"),
        ("/set top-p 2", "generation.top_p=2.0 is not in [0, 1]"),
        ("/set --generation.top-p=2", "generation.top_p=2.0 is not in [0, 1]"),
        ("/set stop 5", "generation.stop=5 does not fit"),
        ("/set max_new_tokens null", "generation.max_new_tokens=None does not fit"),
        ("/set logprobs true", "generation.logprobs=True is not seen in a text"),
        ("/set context_stride 99", "generation.context_stride=99 is above the model's"),
        ("/agian", "/agian is no command; did you mean /again?"),
        ("/xyzzy", "/xyzzy is no command; /help shows them"),
        ("/again", "/again has no text to continue anew"),
        ("\udcff", "is not UTF-8"),
    ],
)
def test_a_mistake_costs_a_line(checkpoint: Path, run: Run, line: str, message: str) -> None:
    stdin = f"{line}\n/set context_stride null\n/settings\nThe\n".encode("utf-8", "surrogateescape")
    if "context_stride" in line:
        stdin = line.encode() + b"\nThe\n" + stdin.partition(b"\n")[2]
    text, messages, code = run("--generation.max_new_tokens", "2", stdin=stdin)
    errors = [line for line in messages.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "temperature 0.7\n" in messages and "stop []\n" in messages and "max_new_tokens 2\n" in messages
    assert text.count("The") == 1  # not where it is refused
    assert code == 2  # a script is to notice


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ckpt_path", "none.ckpt"], "error: ckpt_path=none.ckpt is not a file"),
        (["--default_root_dir", "elsewhere"], "elsewhere/checkpoints holds no checkpoint"),
        (["--device", "cuda:99"], "error: device=cuda:99 is not there; choose "),
        (["--device", "meta"], "error: device=meta is not there; choose "),
        (["--device", "toaster"], "error: device=toaster is unknown; choose "),
        (["--precision", "float8"], "error: precision=float8 does not fit; give float32, bfloat16"),
        (["--generation.top_p", "2"], "error: generation.top_p=2.0 is not in [0, 1]"),
        (["--generation.top_n", "2"], "did you mean --generation.top_p?"),
        (["--data.prompts", "x"], "did you mean --prompt?"),
        (["The Time Traveller"], "a prompt is --prompt 'The Time Traveller'\n"),
        (["The", "cat's", "--top-p=0.5"], """a prompt is --prompt 'The cat'"'"'s'\n"""),
        (["--prompt", "a\udcff"], "error: prompt='a\\udcff' is not UTF-8"),
        (["--generation.logprobs", "true"], "error: generation.logprobs=True is not seen in a text"),
        ([], "error: standard input holds no line to continue; give --prompt TEXT"),
    ],
)
def test_mistakes_end_in_one_line(checkpoint: Path, run: Run, words: list[str], message: str) -> None:
    text, messages, code = run(*words)
    assert message in messages and "Traceback" not in messages
    assert (text, code) == ("", 2)


def test_the_help_page_is_short(run: Run) -> None:
    page, _, code = run("--help")
    assert code == 0 and "--generation.temperature" in page and len(page.splitlines()) < 60
    assert "SUPPRESS" not in page and "shtab" not in page


def test_settings_are_read_as_on_the_command_line() -> None:
    settings = GenerationConfig()
    given = [("top_k", "null", None), ("temperature", "1", 1.0), ("stop", '["\\n"]', ["\n"])]
    for name, value, read in given:
        assert getattr(with_setting(settings, name, value), name) == read
    assert with_setting(settings, "do_sample", "false").is_greedy


# ---- a program of its own, forked after the imports


def run_forked(words: Sequence[str]) -> NoReturn:
    """The program as a new interpreter would run it on these descriptors; ends this process."""
    status: int | str | None = 1
    try:
        # A job in the background of a shell's script is begun with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)  # the threads of the pool are not forked
        sys.stdin, sys.stdout = open(0, encoding="utf-8", closefd=False), open(1, "w", 1, closefd=False)
        sys.stderr = open(2, "w", 1, closefd=False)
        main(["generate", *words])
        status = 0
    except SystemExit as exit:
        status = exit.code if exit.code is not None else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 1)


class Piped:
    """The program with its text and its messages in pipes."""

    def __init__(self, *words: str) -> None:
        (text, write_text), (messages, write_messages) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(write_text, 1)
            os.dup2(write_messages, 2)
            run_forked(words)
        os.close(write_text)
        os.close(write_messages)
        self.text, self.messages = open(text, "rb"), open(messages, "rb")

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Terminal:
    """The program at a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        import pty

        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            run_forked(words)
        self._shown = ""

    def wait_for(self, pattern: str, again: str = "") -> str:
        """What is shown up to the end of this pattern; `again` is typed whenever nothing more comes.

        Python does not see a signal that comes just before it waits for a key.
        """
        deadline = time.monotonic() + 60
        while not (match := re.search(pattern, self._shown)):
            assert time.monotonic() < deadline, f"{pattern} does not come; shown: {self._shown[-2000:]}"
            if select.select([self._descriptor], [], [], 1.0)[0]:
                self._shown += os.read(self._descriptor, 65536).decode("utf-8", errors="replace")
            else:
                self.type(again)
        shown, self._shown = self._shown[: match.end()], self._shown[match.end() :]
        return shown

    def type(self, text: str) -> None:
        if text:
            os.write(self._descriptor, text.encode())

    def exit_code(self) -> int:
        """After the rest of what it shows."""
        self._read_to_the_end()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def end_by(self, number: signal.Signals) -> int:
        while not self._read_to_the_end(timeout=1.0):  # again and again, as in `wait_for`
            os.kill(self.pid, number)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read_to_the_end(self, timeout: float = 60.0) -> bool:
        """Whether the program closes the terminal before it is quiet for so long."""
        while select.select([self._descriptor], [], [], timeout)[0]:
            try:
                os.read(self._descriptor, 65536)
            except OSError:  # how Linux says that the other end is closed
                return True
        return False

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.fixture
def terminal(checkpoint: Path) -> Iterator[Terminal]:
    started = Terminal("--generation.max_new_tokens", "100000", "--generation.top_k", "3")
    yield started
    started.close()


CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.mark.slow
def test_ctrl_c_ends_the_text_and_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type(CTRL_C)
    terminal.wait_for("Ctrl-D ends the program", again=CTRL_C)
    terminal.wait_for("> ")
    terminal.type("The cat\n")
    terminal.wait_for("(?s)The cat.*The cat.{20}")  # as typed, and as written
    terminal.type(CTRL_C)
    terminal.wait_for(r"tokens/s; ended by Ctrl-C\s+> ")
    terminal.type("/set max_new_tokens 3\n")
    terminal.wait_for("> ")
    terminal.type("从前\n")
    assert "Traceback" not in terminal.wait_for(r"3 tokens in [^\n]*; ended by its length\s+> ")
    terminal.type(CTRL_D)
    assert terminal.exit_code() == 0


@pytest.mark.slow
@pytest.mark.parametrize("when", ["waiting", "writing"])
def test_sigterm_ends_the_program(terminal: Terminal, when: str) -> None:
    terminal.wait_for("> ")
    if when == "writing":
        terminal.type("The cat\n")
        terminal.wait_for("(?s)The cat.*The cat.{20}")
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.end_by(signal.SIGTERM) == 143


@pytest.mark.slow
def test_a_signal_ends_a_single_text(checkpoint: Path) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = Piped("--prompt", "The", "--generation.max_new_tokens", "100000")
        with process.text as text, process.messages as messages:
            assert len(text.read(50)) == 50
            os.kill(process.pid, number)
            text.read()
            assert b"Traceback" not in messages.read() and process.exit_code() == code


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_quietly(checkpoint: Path) -> None:
    """In an interpreter of its own, which has something to say at its end."""
    command = [sys.executable, "-m", "gpt_lightning", "generate", "--prompt", "The"]
    process = subprocess.Popen(
        [*command, "--generation.max_new_tokens", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    assert len(process.stdout.read(10)) == 10
    process.stdout.close()
    messages = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0 and messages.count(b"\n") == 1  # which checkpoint it is


def test_the_fastest_device_there_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(None) == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device=cuda:2 is not there"):
        choose_device("cuda:2")
