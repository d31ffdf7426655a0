"""Holds `serve` to its options, to the text of predict beside 31 other clients, and to signals."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

from gpt_lightning.__main__ import main  # noqa: E402
from gpt_lightning.cli.serve import _names  # noqa: E402
from tests.cli.test_generate import write_checkpoint  # noqa: E402


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoints" / "run" / "last.ckpt"
    write_checkpoint(path)
    return path


@contextmanager
def program(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program in a process of its own, and its address."""
    command = [sys.executable, "-m", "gpt_lightning", "serve", "--port", "0", "--device", "cpu", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving .* at (http://\S+)", line):
                break
        else:
            pytest.fail("".join(lines))
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


WRONG = {
    "rows": (["--rows", "0"], "rows=0 is below 1"),
    "port": (["--port", "70000"], "port=70000 is not from 0 to 65535"),
    "host": (["--host", "0.0.0.0"], "--api_key_file"),
    "no such host": (["--host", "256.1.1.1", "--no_auth", "true"], "host=256.1.1.1"),
    "both": (["--no_auth", "true", "--api_key_file", "x"], "give one of them"),
    "origin": (["--cors_origin", "example.org"], "cors_origin=example.org is no origin"),
    "limit": (["--limits.max_tokens", "0"], "limits.max_tokens=0"),
    "prefill": (["--prefill_tokens", "0"], "prefill_tokens=0"),
    "three": (["--ckpt_path", "a", "--ckpt_path", "b", "--ckpt_path", "c"], "name one or two"),
    "names": (["--name", "a", "--name", "b"], "one name for each checkpoint"),
    "key of vLLM": (["--api-key", "x"], "did you mean --api_key_file?"),
    "name of vLLM": (["--served-model-name", "x"], "did you mean --name?"),
    "rows of vLLM": (["--max-num-seqs", "4"], "did you mean --rows?"),
    "bare checkpoint": (["checkpoints/run"], "a checkpoint is --ckpt_path checkpoints/run"),
    "checkpoint as model": (["--model", "checkpoints/run"], "a checkpoint is --ckpt_path checkpoints/run"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_option_is_refused_in_a_line(
    kind: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, said = WRONG[kind]
    with pytest.raises(SystemExit) as exit:
        main(["serve", "--port", "0", *words])
    assert exit.value.code == 2 and said in capsys.readouterr().err


def test_several_processes_are_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit:
        main(["serve"])
    assert exit.value.code == 2 and "without torchrun" in capsys.readouterr().err


def test_models_are_called_after_their_runs() -> None:
    paths = [Path("runs/one/last.ckpt"), Path("runs/two/last.ckpt")]
    assert _names(paths, None) == ["one", "two"] and _names(paths, ["a", "b"]) == ["a", "b"]
    assert _names([paths[0], Path("runs/one/step000500.ckpt")], None) == ["one/last", "one/step000500"]
    with pytest.raises(ValueError, match="--name"):
        _names([paths[0], paths[0]], None)


def drawn(address: str, **fields: Any) -> list[dict[str, Any]]:
    answer = httpx.post(f"{address}/v1/completions", json=fields, timeout=120)
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def predicted(folder: Path, prompts: list[str], *words: str) -> list[dict[str, Any]]:
    main(["predict", "--data.prompts", json.dumps(prompts), "--output", str(folder / "out.jsonl"), *words])
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_each_text_is_that_of_predict_while_others_are_busy(
    quantize: str | None, checkpoint: Path, tmp_path: Path
) -> None:
    prompts = ["The cat", "从前有", "", "naïve e\u0301"]
    quantized = [] if quantize is None else ["--generation.quantize", quantize]
    common = ["--trainer.accelerator", "cpu", "--generation.max_new_tokens", "40", *quantized]
    settings = [{"temperature": 0.0}, {"temperature": 1.2, "seed": 5, "top_p": 0.9}]
    with program(tmp_path, *quantized) as (_, address):
        ended = threading.Event()

        def disturb(number: int) -> None:
            while not ended.is_set():
                fields = {"temperature": 1.0, "top_k": number + 1, "logprobs": number % 3}
                drawn(address, prompt="The dog " * (number % 5), max_tokens=5 + number, **fields)

        with ThreadPoolExecutor(31) as others:
            busy = [others.submit(disturb, number) for number in range(31)]
            found = [drawn(address, prompt=prompts, max_tokens=40, logprobs=1, **each) for each in settings]
            ended.set()
            for other in busy:
                other.result()
    for each, choices in zip(settings, found):
        words = [f"--generation.{name}={value}" for name, value in each.items()]
        rows = predicted(tmp_path, prompts, "--generation.logprobs", "true", *words, *common)
        for row, choice in zip(rows, choices, strict=True):
            assert choice["text"] == row["completion"]
            # As far as one row's kernel rounds like many rows' one.
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(row["logprobs"], abs=2e-5)
            assert choice["finish_reason"] == {"eos": "stop"}.get(row["finish_reason"], row["finish_reason"])


@pytest.mark.slow
@pytest.mark.parametrize(("grace", "n_signals", "code"), [("30", 1, 0), ("0", 1, 143), ("30", 2, 143)])
def test_what_runs_at_sigterm_ends_within_the_grace_time(
    grace: str, n_signals: int, code: int, checkpoint: Path, tmp_path: Path
) -> None:
    n = 400 if code == 0 else 4000
    with program(tmp_path, "--limits.grace_seconds", grace) as (process, address):
        fields = {"max_tokens": n, "stream": True, "stream_options": {"include_usage": True}}
        fields["logit_bias"] = {"0": -100}  # no eos
        with httpx.stream("POST", f"{address}/v1/completions", json=fields, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            process.send_signal(signal.SIGTERM)
            if n_signals == 2:
                with suppress(httpx.TransportError):  # until the first one is heeded
                    while httpx.get(f"{address}/health").is_success:
                        pass
                process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert process.wait(60) == code
        assert process.stderr is not None
        said = process.stderr.read()
        assert f"requests under way: 1; they have up to {grace} s to end" in said and "Traceback" not in said
    if code == 0:
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["usage"]["completion_tokens"] == n
    else:
        assert json.loads(rest[-1][6:])["error"]["code"] == "shutting_down"
