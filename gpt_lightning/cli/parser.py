"""Parses the command line with exact option names, short errors and help pages, without Lightning."""

import argparse
import difflib
import io
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from contextvars import Context
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, get_loader, set_loader
from typing_extensions import override

from gpt_lightning.callbacks.terminal import plain_stderr, printable
from gpt_lightning.cli.errors import shorten
from gpt_lightning.exit_codes import MISTAKE, UserError

QUOTED = re.compile(r"""["'`]([\w.]+)["'`]""")
UNKNOWN = re.compile(r"(?:not accept|not accepted|[Uu]nrecognized|not expected|unknown|invalid choice)")
NO_CONFIG = re.compile(r"""(?s)Parser key "(\w+)":\s+Unable to load config '(.*?)'\s+-\s+(?=Parser key)""")
DENIED = re.compile(r"Importing '([\w.]+)' is not allowed")
NAMED = re.compile(
    r"""Parser key "([\w.]+)"|Group '([\w.]+)' does not accept option '([\w.]+)'|Option '([\w.]+)' is not"""
)
OF_AN_ITEM = re.compile(r"[Uu]nrecognized arguments: --(\d+\.[\w.]+)")
NO_CLASS = re.compile(r"No module named .*|module .* has no attribute .*|Import path does not correspond .*")
ALLOW_IMPORT = "--allow_import"
# What options are called in other programs, by their last names here.
ELSEWHERE = {
    "lr": "learning_rate",
    "block_size": "seq_len",
    "n_embd": "d_model",
    "hidden_size": "d_model",
    "max_iters": "max_steps",
    "num_steps": "max_steps",
    "epochs": "max_epochs",
    "eval_interval": "val_check_interval",
    "grad_clip": "gradient_clip_val",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "micro_batch_size": "batch_size",
    "train_data": "train_files",
    "tokenizer_name": "tokenizer",
    "out_dir": "default_root_dir",
    "dataset": "train_files",
    "seed": "seed_everything",
    "device": "accelerator",
    "dtype": "precision",
    "log_interval": "log_every_n_steps",
    "eval_iters": "limit_val_batches",
    "min_lr": "min_lr_ratio",
    "compile": "compile_backend",
    "max_tokens": "max_new_tokens",
    "api_key": "api_key_file",
    "served_model_name": "name",
    "max_num_seqs": "rows",
    "allowed_origins": "cors_origin",
}
TRUSTED = ("gpt_lightning", "lightning", "lightning_fabric", "pytorch_lightning", "torch", "torchmetrics")
# What options can need of the large ones: the rest of them also starts programs and downloads code.
_OF_TRAINERS = "accelerators callbacks loggers plugins profilers strategies".split()
_OF_TORCH = (
    "nn optim profiler amp cuda.amp device distributed.fsdp distributed.algorithms distributed.optim "
    "distributed.device_mesh distributed.tensor float16 bfloat16 float32 float64"
).split()
TRUSTED_PARTS = [
    "gpt_lightning",
    "torchmetrics",
    *(f"torch.{part}" for part in _OF_TORCH),
    *(f"{name}.{part}" for name in ("lightning.pytorch", "pytorch_lightning") for part in _OF_TRAINERS),
    *(f"{name}.{part}" for name in ("lightning.fabric", "lightning_fabric") for part in _OF_TRAINERS),
]
LAUNCHERS = [f"{part}.launchers" for part in TRUSTED_PARTS if part.endswith(".strategies")]


# Stands alone for the words of a verb whose parser is wanted, and no run.
PARSER_ONLY = "--parser-only"


class ParserMade(Exception):
    """Brings a verb's parser to who asked for it with PARSER_ONLY."""

    def __init__(self, parser: ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


class PlainParser(ArgumentParser):
    """Refuses abbreviated options: `--model.config.n_layer` would quietly set n_layers."""

    arguments = "[--option value ...]"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Without a name, the parser of a class inside the options would be called after sys.argv[0].
        super().__init__(*args, allow_abbrev=False, **{"prog": "gpt-lightning", **kwargs})
        bound_values()

    @override
    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] == [PARSER_ONLY]:
            raise ParserMade(self)
        try:
            return super().parse_args(*args, **kwargs)
        except RecursionError:
            raise UserError("an option's value is nested too deeply to be read; flatten it") from None

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        reason = shorten(message)
        if (wrong := NO_CLASS.search(message)) and (given := re.search(r"Given value: ([\w.]+)", message)):
            reason = f"class_path={given[1]} does not fit: {wrong[0]}; name a class, as package.Class"
        if unread := NO_CONFIG.match(message):
            reason = f"{unread[1]}={unread[2]} is neither a file of options nor {{option: value}}"
        if inner := OF_AN_ITEM.search(message):
            reason = f"{inner[1]} is of one item of a list; give the whole list, or write it in a file"
            message = ""  # of which an option of the item would be suggested
        # A list of files in the place of a mixture is taken for names of classes.
        if "MixtureSource" not in message and (denied := DENIED.search(message)):
            package = denied[1].split(".")[0]
            why = f"only {', '.join(TRUSTED)} are trusted"
            if package in TRUSTED:  # more of it than a configuration needs
                package, why = denied[1].rpartition(".")[0], f"no option needs this part of {package}"
            reason = (
                f"class_path={denied[1]} is not imported: {why}; if you trust it, add "
                f"{ALLOW_IMPORT} {package} to the command line"
            )
        lines = [f"error: {reason}", *self._suggestion(message), *self._others(message)]
        lines += [f"try: {self.prog} --help"]
        plain_stderr().write(printable("\n".join(lines)) + "\n")
        sys.exit(MISTAKE)

    def _others(self, message: str) -> list[str]:
        """Finds what else is wrong, by parsing once more without the option that the message names."""
        if (named := NAMED.match(message)) is None:
            return []
        # Whatever comes of words of which one is left out, what is known is told.
        with redirect_stderr(io.StringIO()) as said, suppress(SystemExit, Exception):
            words = without_option(self.args, named[1] or named[4] or f"{named[2]}.{named[3]}")
            if words != self.args:
                Context().run(self.parse_args, words)  # not within what is being parsed
        return [line for line in said.getvalue().splitlines() if line.startswith(("error: ", "did you mean"))]

    def _suggestion(self, message: str) -> list[str]:
        """Suggests for each unknown option the known one that is closest, if one is close."""
        if (unread := NO_CONFIG.match(message)) and unread[1] == "data":
            return [f"a text is --data.train_files {shlex.quote(unread[2])}"]
        if not UNKNOWN.search(message):
            return []
        known = [action.dest for action in self._actions]
        meant: dict[str, str] = {}
        quoted = [("", name) for name in QUOTED.findall(message)]
        for dashes, given in [*re.findall(r"(--)([\w.-]+)", message), *quoted]:
            if given not in known and f"--{given}" not in meant and (close := _closest(given, known)):
                meant[dashes + given] = dashes + close
        if len(meant) == 1:
            return [f"did you mean {next(iter(meant.values()))}?"]
        if meant:
            return [f"did you mean {', '.join(f'{right} ({given})' for given, right in meant.items())}?"]
        if bare := re.search(r"(?s)[Uu]nrecognized arguments: ([^-\s].*)", message):
            words = bare[1].partition(" --")[0]
            expanded = _for_expanded(getattr(self, "args", []), words.partition(" ")[0])
            return expanded or _for_bare_words(words, known)
        return []

    @override
    def format_usage(self) -> str:
        return f"usage: {self.prog} {self.arguments}\n"

    @override
    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """Gives one or two lines to an option."""
        lines = [self.format_usage(), f"{self.description}\n"]
        defaults = self.get_defaults(skip_validation=True)
        for group in self._action_groups:
            shown = [action for action in group._group_actions if self._is_shown(action)]
            lines.extend(_option_lines(shown, defaults))
        return "\n".join(lines).rstrip() + "\n"

    def _is_shown(self, action: argparse.Action) -> bool:
        is_option = bool(action.option_strings) and action.option_strings[0].startswith("-")
        return is_option and action.help not in (argparse.SUPPRESS, "Path to a configuration file.")


def without_option(words: Sequence[str], key: str) -> list[str]:
    """Leaves an option out, and what is within it, on the command line and in the files that this names.

    Nothing of what is left shows help or a configuration.
    """
    shows = ("-h", "--help", "--print_config")  # which take no value from the next word
    found, remaining = [], (word for word in words if word.partition("=")[0] not in shows)
    for word in remaining:
        option, equals, value = word.partition("=")
        following = [] if equals or not option.startswith("--") else [*islice(remaining, 1)]
        if option.rstrip("+") == f"--{key}" or option.startswith(f"--{key}."):
            continue
        if option == "--config":
            following = [_without_key(value if equals else following[0], key)]
            word = option
        found += [word, *following]
    return found


def _without_key(config: str, key: str) -> str:
    """Returns the name of a file or, where it holds the key, the contents without, which do as well."""
    from gpt_lightning.cli.yaml_text import load_yaml

    is_file = os.path.isfile(config)
    contents = inner = load_yaml(Path(config).read_text(encoding="utf-8-sig") if is_file else config)
    *groups, name = key.split(".")
    for group in groups:
        inner = inner.get(group) if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or name not in inner:
        return config
    del inner[name]
    return json.dumps(contents, default=str)


@cache
def bound_values() -> None:
    """Has every value, and every file that stands for one, refused where it would grow without end."""
    import yaml  # as late as jsonargparse does

    from gpt_lightning.cli.yaml_text import check_bounded

    read = get_loader("yaml")

    def read_bounded(text: str) -> Any:
        check_bounded(text)
        return read(text)

    set_loader("yaml", read_bounded, exceptions=(yaml.YAMLError,))


def _closest(given: str, known: list[str]) -> str | None:
    name = given.replace("-", "_")
    last = name.rpartition(".")[2]
    if meant := [key for key in known if key.rpartition(".")[2] == ELSEWHERE.get(last, last)]:
        return meant[0]
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return close[0]
    # The right word under another group: `model.config.n_layers` for `model.n_layers`.
    last_names = {key.rpartition(".")[2]: key for key in known}
    return next((last_names[word] for word in difflib.get_close_matches(last, last_names, 1, 0.75)), None)


def _for_expanded(words: Sequence[str], word: str) -> list[str]:
    """Suggests to quote the pattern of which a shell has made several words."""
    before = words[: words.index(word)] if word in words else ()
    option = next((each.partition("=")[0] for each in reversed(before) if each.startswith("--")), "")
    texts = ("--data.train_files", "--data.val_files", "--data.test_files")
    if option not in texts or not os.path.exists(word):
        return []
    folder, name = os.path.split(word)
    pattern = shlex.quote(os.path.join(folder, "*" + os.path.splitext(name)[1]))
    return [f"quote a pattern, {option} {pattern}, or name the folder, {option} {shlex.quote(folder or '.')}"]


def _for_bare_words(words: str, known: list[str]) -> list[str]:
    """Suggests the option that words without one may be meant for."""
    word = words.partition(" ")[0]
    if "ckpt_path" in known and (word.endswith(".ckpt") or os.path.exists(os.path.join(word, "last.ckpt"))):
        return [f"a checkpoint is --ckpt_path {shlex.quote(word)}"]
    if "prompt" in known:
        return [f"a prompt is --prompt {shlex.quote(words)}"]
    if "data.train_files" in known and os.path.exists(word):
        return [f"the text is --data.train_files {word}"]
    return [f"a recipe, or a file of options, is --config {word}"] if "config" in known else []


def _option_lines(actions: list[argparse.Action], defaults: Any) -> list[str]:
    lines = []
    for action in actions:
        name = action.option_strings[-1 if action.dest in ("help", "config") else 0]
        value = defaults.get(action.dest)
        default = "" if value is None else f" [{value}]"
        help = " ".join(str(action.help).replace("``", "").split())
        first = re.split(r"(?<=[a-z)])\. | Default: ", help)[0].rstrip(".").replace("%%", "%")
        lines.append(option_line(name, first + default))
    return [*lines, ""] if lines else []


def option_line(name: str, text: str) -> str:
    return textwrap.fill(text, 110, initial_indent=f"  {name:38} ", subsequent_indent=" " * 41)
