"""A signal while no step is trained ends the program at once: one line, the code, nothing half-written."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.__main__ import main
from gpt_lightning.callbacks.orderly_stop import OrderlyStop
from gpt_lightning.callbacks.start_signals import EXIT_CODES, EndedBySignal, StartSignals
from gpt_lightning.training.module import GPTLightningModule
from tests.log import STARTING, TIME, since_start, untimed

Config = Callable[..., Path]
WEIGHTS_ALONE = ["--checkpoint.save_weights_only", "true"]
CODES = [("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130)]


def send(name: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: os.kill(os.getpid(), getattr(signal, name))


def ends(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, list[str]]:
    """The code, and what was said; signals are heard as before."""
    before = [signal.getsignal(getattr(signal, name)) for name in EXIT_CODES]
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert [signal.getsignal(getattr(signal, name)) for name in EXIT_CODES] == before
    return exit.value.code, untimed(since_start(capsys.readouterr().err)).splitlines()


@pytest.fixture
def first_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RANK", raising=False)
    yield


@pytest.mark.parametrize("name, code", CODES)
def test_while_the_program_is_imported(
    name: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first_rank: None,
) -> None:
    monkeypatch.setattr("gpt_lightning.cli.main.import_module", send(name))
    line = f"{name}: ended before the first step; nothing is saved"
    assert ends(["fit"], capsys) == (code, [line])
    assert ends(["predict"], capsys) == (code, [f"{name}: predict ended"])
    monkeypatch.setenv("RANK", "1")
    assert ends(["fit"], capsys) == (code, [])


def test_an_import_that_takes_the_signal_for_its_own_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], first_rank: None
) -> None:
    def import_module(name: str) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            return sys

    monkeypatch.setattr("gpt_lightning.cli.main.import_module", import_module)
    monkeypatch.setattr(sys, "run", lambda words: pytest.fail("it went on"), raising=False)
    assert ends(["fit"], capsys)[0] == 143


@pytest.mark.parametrize("verb", ["fit", "prepare"])
@pytest.mark.parametrize("name, code", CODES[1:])
def test_while_text_is_tokenized(
    verb: str,
    name: str,
    code: int,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first_rank: None,
) -> None:
    config = tiny_config()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("gpt_lightning.data.cache_folder.write_digests", send(name))
    ended, said = ends([verb, "--config", str(config)], capsys)
    assert ended == code and sorted(tmp_path.rglob("*")) == before
    what = "prepare ended" if verb == "prepare" else "ended before the first step; nothing is saved"
    assert said[-1] == f"{name}: {what}" and len([line for line in said if name in line]) == 1


def test_in_the_validation_before_training_and_after_training(
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first_rank: None,
) -> None:
    words = ["fit", "--config", str(tiny_config())]
    with monkeypatch.context() as patched:
        patched.setattr(GPTLightningModule, "validation_step", send("SIGTERM"))
        code, said = ends(words, capsys)
    assert code == 143 and said[-1] == "SIGTERM: ended before the first step; nothing is saved"
    assert not [*tmp_path.rglob("*.ckpt*")]
    monkeypatch.setattr("gpt_lightning.cli.fit_run.tell_how_to_go_on", send("SIGTERM"))
    code, said = ends(words, capsys)
    assert code == 143 and said[-1] == "SIGTERM: ended after training"
    assert len([*tmp_path.rglob("last.ckpt")]) == 1


@pytest.mark.parametrize(
    "options, announced, saved",
    [
        ([], ", with a checkpoint", r"; go on with --ckpt_path \S+last.ckpt"),
        (WEIGHTS_ALONE, ", with a checkpoint", r"; --init_from \S+last.ckpt begins .*"),
        (["--trainer.fast_dev_run", "true"], "", ""),
        (["--trainer.enable_checkpointing", "false"], "", ""),
    ],
)
def test_a_run_that_is_stopped_says_when_it_was_and_what_is_saved(
    options: list[str],
    announced: str,
    saved: str,
    tiny_config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    first_rank: None,
) -> None:
    words = ["fit", "--config", str(tiny_config()), *options]
    monkeypatch.setattr(OrderlyStop, "on_train_batch_start", send("SIGTERM"))
    with pytest.raises(SystemExit) as ended:
        main(words)
    lines = capfd.readouterr().err.splitlines()
    assert ended.value.code == 143 and [line for line in lines if not re.match(TIME, line)] == []
    said = [re.sub(TIME, "", line) for line in lines]
    assert re.fullmatch(STARTING, said[0] + "\n")
    assert said[-2] == f"SIGTERM: ending after this step{announced}"
    assert re.fullmatch(f"stopped by a signal at step 1{saved}", said[-1])


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As a shell has it for what it runs in the background."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StartSignals("fit"):
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, former)


def test_a_rank_that_waits_for_others_outside_of_python_ends() -> None:
    """As in a rendezvous where the first rank never comes, since it was refused."""
    script = """
import ctypes, os, signal, sys
from gpt_lightning.callbacks.start_signals import StartSignals
with StartSignals("fit"):
    print("waits", flush=True)
    ctypes.PyDLL(None).pause()
    ctypes.PyDLL(None).pause()
"""
    environment = {**os.environ, "LOCAL_RANK": "1", "RANK": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "waits\n"
    process.terminate()
    assert process.wait(timeout=60) == -signal.SIGTERM


def test_an_error_of_the_way_out_hides_nothing(capsys: pytest.CaptureFixture[str], first_rank: None) -> None:
    with pytest.raises(SystemExit) as exit, StartSignals("validate"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except EndedBySignal:
            raise RuntimeError("while it ends")
    assert exit.value.code == 143 and capsys.readouterr().err == "SIGTERM: validate ended\n"
