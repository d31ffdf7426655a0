"""Reads prompts and commands in a loop, a line each: Ctrl-C ends a text and not the program."""

import difflib
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import FrameType
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from gpt_lightning.cli.errors import shorten
from gpt_lightning.data.prompts import check_utf8
from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.sampling import GenerationConfig

HELP = """\
TEXT              continue it; an empty line starts a new document
//TEXT            continue /TEXT
/set NAME VALUE   change a setting, such as: /set temperature 0.5
/settings         show the settings
/again            continue the last text anew, with the next seed
/help             show this
/quit             end, as Ctrl-D does
Ctrl-C            end the text that is being written"""

Write = Callable[[str, GenerationConfig, Callable[[], bool]], None]


class Repl:
    """Has `write` continue each prompt by the settings, until Ctrl-C interrupts the text."""

    def __init__(self, write: Write, settings: GenerationConfig, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.n_lines, self.n_refused = 0, 0  # all, and those that held a mistake
        self._write, self._say = write, say
        self._last_prompt: str | None = None
        self._is_interrupted: Callable[[], bool] = lambda: False
        self._ended = False
        self._commands: dict[str, Callable[[str], None]] = {
            "set": self._set,
            "settings": self._show_settings,
            "again": self._again,
            "help": lambda _: self._say(HELP),
            "quit": self._quit,
        }

    def run(self, read: Callable[[], str | None], *, at_terminal: bool) -> None:
        """Ends when `read` has no more lines, or at /quit."""
        while not self._ended:
            try:
                if (line := read()) is None:
                    break
                self.n_lines += 1
                with noting_interrupts(at_terminal) as self._is_interrupted:
                    self._handle(line)
            except KeyboardInterrupt:
                if not at_terminal:
                    raise
                self._say("\n/quit or Ctrl-D ends the program")

    def _handle(self, line: str) -> None:
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._command(line[1:])
            else:
                self._continue(line.removeprefix("/"))
        except UserError as error:
            self.n_refused += 1
            self._say(f"error: {shorten(str(error))}")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            close = difflib.get_close_matches(name, self._commands, n=1)
            remedy = f"did you mean /{close[0]}?" if close else "/help shows them; a text may begin with //"
            raise UserError(f"/{name} is no command; {remedy}")
        self._commands[name](rest.strip())

    def _continue(self, prompt: str) -> None:
        check_utf8(prompt, f"prompt={prompt!r}", "convert it")
        self._last_prompt = prompt
        self._write(prompt, self.settings, self._is_interrupted)

    def _set(self, words: str) -> None:
        name, value, *_ = [*re.split(r"[\s=]+", words, maxsplit=1), ""]
        self.settings = with_setting(self.settings, name.removeprefix("generation."), value.strip())

    def _show_settings(self, _: str) -> None:
        for name, value in asdict(self.settings).items():
            self._say(f"{name} {json.dumps(value, ensure_ascii=False)}")

    def _again(self, _: str) -> None:
        if self._last_prompt is None:
            raise UserError("/again has no text to continue anew; write one first")
        self.settings = replace(self.settings, seed=self.settings.seed + 1)
        self._say(f"seed {self.settings.seed}")
        self._continue(self._last_prompt)

    def _quit(self, _: str) -> None:
        self._ended = True


def with_setting(settings: GenerationConfig, name: str, value: str) -> GenerationConfig:
    """Replaces one of the settings by a value that is read as the command line reads it."""
    known = asdict(settings)
    if name not in known or not value:
        close = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {close[0]}?" if close and name not in known else "write /set NAME VALUE"
        problem = "has no value" if name in known else "is no setting"
        raise UserError(f"/set {name}".rstrip() + f" {problem}; {remedy}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GenerationConfig, "generation")
    try:
        read: Any = parser.parse_args([f"--generation.{name}={value}"], defaults=False)
    except ArgumentError as error:
        raise UserError(shorten(str(error))) from None
    return check_shown(replace(settings, **{name: read[f"generation.{name}"]}))


def check_shown(settings: GenerationConfig) -> GenerationConfig:
    """Refuses what a text alone cannot show."""
    if settings.logprobs:
        raise UserError("generation.logprobs=True is not seen in a text; use gpt-lightning predict")
    return settings


@contextmanager
def noting_interrupts(at_terminal: bool) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C came; a second one raises KeyboardInterrupt."""
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    if not at_terminal or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    former = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, former)
