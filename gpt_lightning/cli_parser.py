"""The command line's manners: exact option names, errors of two lines, a help page that fits."""

import argparse
import difflib
import re
import sys
import textwrap
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from gpt_lightning import cli_imports

# The Trainer's options that most runs use; the other fifty stand in --help-all.
COMMON_TRAINER_OPTIONS = {
    "trainer." + name
    for name in (
        "accelerator strategy devices precision max_steps max_epochs max_time val_check_interval "
        "limit_val_batches log_every_n_steps accumulate_grad_batches gradient_clip_val "
        "default_root_dir fast_dev_run"
    ).split()
}
HIDDEN = {"weights_only", "return_predictions"}
QUOTED = re.compile(r"""["'`]([\w.]+)["'`]""")
UNKNOWN = re.compile(r"(?:not accept|not accepted|[Uu]nrecognized|not expected|unknown|invalid choice)")


class Parser(LightningArgumentParser):
    """Options are never abbreviated: `--model.config.n_layer` would quietly set n_layers."""

    show_all = False
    instantiators: list[Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Without a name, the parser of a class inside the options would be called after sys.argv[0].
        super().__init__(*args, allow_abbrev=False, **{"prog": "gpt-lightning", **kwargs})

    @override
    def instantiate_classes(self, cfg: Namespace, **kwargs: Any) -> Namespace:
        # Lightning calls this old name; the new one takes functions that build a class in their own way.
        return self.instantiate(cfg, instantiators=self.instantiators, **kwargs)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        lines = [f"error: {shorten(message)}", *self._suggestion(message)]
        if self.prog:
            lines.append(f"try: {self.prog.split(' [')[0]} --help")
        sys.stderr.write("\n".join(lines) + "\n")
        sys.exit(2)

    def _suggestion(self, message: str) -> list[str]:
        """The known option that is closest to the unknown one, if one is close."""
        if not UNKNOWN.search(message):
            return []
        known = [action.dest for parser in self._all_parsers() for action in parser._actions]
        for name in re.findall(r"--([\w.]+)", message) + QUOTED.findall(message):
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.75) or _same_last_name(
                    name, known
                )
                if close:
                    return [f"did you mean {close[0]}?"]
        return []

    def _all_parsers(self) -> list["Parser"]:
        parsers = [self]
        for action in self._actions:
            choices = getattr(action, "choices", None)
            if isinstance(choices, dict):
                parsers.extend(parser for parser in choices.values() if isinstance(parser, Parser))
        return parsers

    @override
    def format_usage(self) -> str:
        return f"usage: {self.prog} [--config FILE] [--option value ...]\n"

    @override
    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """One or two lines an option; Lightning's own page has several hundred."""
        imports = _option_line(f"{cli_imports.OPTION} PACKAGE", cli_imports.HELP) + "\n"
        if Parser.show_all:
            return super().format_help(formatter) + "\n" + imports
        lines = [self.format_usage(), f"{self.description}\n"]
        for group in self._action_groups:
            lines.extend(_option_lines([action for action in group._group_actions if _is_shown(action)]))
        lines += [imports, "Every option, with its type: --help-all"]
        return "\n".join(lines) + "\n"


def _is_shown(action: argparse.Action) -> bool:
    name, help = action.dest, str(action.help)
    if name.startswith("trainer.") and name not in COMMON_TRAINER_OPTIONS:
        return False
    is_option = bool(action.option_strings) and action.option_strings[0].startswith("-")
    return is_option and name not in HIDDEN and help != "Path to a configuration file."


def _option_lines(actions: list[argparse.Action]) -> list[str]:
    lines = []
    for action in actions:
        name = action.option_strings[-1 if action.dest in ("help", "config") else 0]
        default = "" if action.default in (None, argparse.SUPPRESS) else f" [{action.default}]"
        lines.append(_option_line(name, _first_sentence(str(action.help)) + default))
    return [*lines, ""] if lines else []


def _option_line(name: str, text: str) -> str:
    return textwrap.fill(text, 110, initial_indent=f"  {name:38} ", subsequent_indent=" " * 41)


def _first_sentence(help: str) -> str:
    text = " ".join(help.replace("``", "").split())
    return re.split(r"(?<=[a-z)])\. | Default: ", text)[0].rstrip(".").replace("%%", "%")


def _same_last_name(name: str, known: list[str]) -> list[str]:
    """`model.n_layers` for `model.config.n_layers`: the right word under the wrong group."""
    last_names = {key.rsplit(".", 1)[-1]: key for key in known}
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], last_names, n=1, cutoff=0.75)
    return [last_names[match] for match in close]


def shorten(message: str) -> str:
    """A parser's message in one line: option, value and what would do, without the nested types tried."""
    denied = re.search(r"Importing '([\w.]+)' is not allowed", message)
    if denied:
        return (
            f"class_path={denied[1]} is not imported: only {', '.join(cli_imports.TRUSTED)} are trusted; "
            f"if you trust it, add {cli_imports.OPTION} {denied[1].split('.')[0]} to the command line"
        )
    key = re.search(r'Parser key "([\w.]+)"', message)
    given = re.search(r"Given value: (.*)|Got value: (.*)", message)
    expected = re.findall(
        r"Expected an? (<class '\w+'>|typing\.Literal\[.*\]|dot import path string)", message
    )
    if key and given and expected:
        kinds = ", ".join(dict.fromkeys(_plain_type(kind) for kind in expected))
        return f"{key[1]}={given[1] or given[2]} does not fit; give {kinds}"
    text = " ".join(message.split())
    return text if len(text) <= 400 else text[:397] + "..."


def _plain_type(kind: str) -> str:
    """`int` for <class 'int'>, `null` for NoneType, the words themselves for a Literal."""
    text = re.sub(r"<class '(\w+)'>|typing\.Literal\[(.*)\]", r"\1\2", kind)
    return text.replace("NoneType", "null").replace("'", "").replace("dot import path string", "a class path")
