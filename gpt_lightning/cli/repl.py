"""Reads prompts and commands, a line each: Ctrl-C ends a text and not the program."""

import difflib
import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from types import FrameType
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from gpt_lightning.cli.errors import say, shorten
from gpt_lightning.cli.parser import bound_values
from gpt_lightning.data.prompts import as_utf8
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

COMMANDS = ("set", "settings", "again", "help", "quit")
Write = Callable[[str, GenerationConfig, Callable[[], bool]], object]


class Repl:
    """Has `write` continue each prompt by the settings, until Ctrl-C interrupts the text."""

    def __init__(self, write: Write, settings: GenerationConfig) -> None:
        self.settings = settings
        self.n_lines, self.n_refused = 0, 0  # all, and those that held a mistake
        self._write = write
        self._last_prompt: str | None = None
        self._is_interrupted = self._ended = False

    def run(self, read: Callable[[], str | None], *, at_terminal: bool) -> None:
        """Ends when `read` has no more lines, or at /quit."""
        while not self._ended:
            try:
                if (line := read()) is None:
                    break
                self.n_lines += 1
                self._is_interrupted = False
                with handling(signal.SIGINT, self._interrupt) if at_terminal else nullcontext():
                    self._handle(line)
            except KeyboardInterrupt:
                if not at_terminal:
                    raise
                say("\n/quit or Ctrl-D ends the program")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Ends the text; where Ctrl-C comes again, what goes on is broken off."""
        if self._is_interrupted:
            raise KeyboardInterrupt
        self._is_interrupted = True

    def _handle(self, line: str) -> None:
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._command(line[1:])
            else:
                self._continue(line.removeprefix("/"))
        except (UserError, ArgumentError) as error:
            self.n_refused += 1
            say(f"error: {shorten(str(error))}")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        match name:
            case "set":
                setting, value, *_ = [*re.split(r"[\s=]+", rest.strip(), maxsplit=1), ""]
                setting = setting.removeprefix("--").removeprefix("generation.").replace("-", "_")
                self.settings = with_setting(self.settings, setting, value.strip())
            case "settings":
                for setting, shown in asdict(self.settings).items():
                    say(f"{setting} {json.dumps(shown, ensure_ascii=False)}")
            case "again":
                self._again()
            case "help":
                say(HELP)
            case "quit":
                self._ended = True
            case _:
                remedy = "/help shows them; a text may begin with //"
                for close in difflib.get_close_matches(name, COMMANDS, n=1):
                    remedy = f"did you mean /{close}?"
                raise UserError(f"/{name} is no command; {remedy}")

    def _again(self) -> None:
        if self._last_prompt is None:
            raise UserError("/again has no text to continue anew; write one first")
        self.settings = replace(self.settings, seed=self.settings.seed + 1)
        say(f"seed {self.settings.seed}")
        self._continue(self._last_prompt)

    def _continue(self, prompt: str) -> None:
        prompt = as_utf8(prompt, f"prompt={prompt!r}", "convert it")
        self._last_prompt = prompt
        self._write(prompt, self.settings, lambda: self._is_interrupted)


def with_setting(settings: GenerationConfig, name: str, value: str) -> GenerationConfig:
    """Replaces one of the settings by a value that is read as the command line reads it."""
    known = asdict(settings)
    if name not in known or not value:
        remedy = "write /set NAME VALUE"
        if name and name not in known:
            begun = [each for each in known if each.startswith(name)]
            close = begun or difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {' or '.join(close)}?" if close else remedy
        problem = "has no value" if name in known else "is no setting"
        raise UserError(f"/set {name}".rstrip() + f" {problem}; {remedy}")
    bound_values()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GenerationConfig, "generation")
    read: Any = parser.parse_args([f"--generation.{name}={value}"], defaults=False)
    return check_shown(replace(settings, **{name: read[f"generation.{name}"]}))


def check_shown(settings: GenerationConfig) -> GenerationConfig:
    """Refuses what a text alone cannot show."""
    for name, value in (("logprobs", settings.logprobs), ("top_logprobs", settings.top_logprobs)):
        if value:
            raise UserError(f"generation.{name}={value} is not seen in a text; use gpt-lightning predict")
    return settings


@contextmanager
def handling(number: signal.Signals, handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Has `handle` called when this signal comes."""
    former = signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, former)
