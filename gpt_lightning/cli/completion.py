"""Prints the script by which a shell completes verbs and options, made by shtab of the verbs' own parsers."""

import argparse
from contextlib import ExitStack
from importlib import import_module
from typing import Literal, get_args, get_origin

from jsonargparse import ArgumentParser

from gpt_lightning.callbacks.rank_guard import RankGuard
from gpt_lightning.cli.app import GPTLightningCLI
from gpt_lightning.cli.checks import PATHS
from gpt_lightning.cli.main import VERBS, WITHOUT_TRAINER
from gpt_lightning.cli.parser import PARSER_ONLY, ParserMade
from gpt_lightning.exit_codes import UserError

SHELLS = ("bash", "zsh", "tcsh")
OF_FILES = {*PATHS, "config", "data.train_files", "data.val_files", "data.test_files"}


def print_completion(words: list[str]) -> None:
    """Reads the name of the shell."""
    if len(words) != 1 or words[0] not in SHELLS:
        raise UserError(f"--print_shtab needs the name of a shell; give one of {', '.join(SHELLS)}")
    try:
        import shtab
    except ImportError:
        raise UserError("--print_shtab needs shtab; pip install 'gpt_lightning[completion]'") from None
    program = argparse.ArgumentParser("gpt-lightning")
    verbs = program.add_subparsers()
    for verb, text in VERBS.items():
        # Of plain options: jsonargparse's own script follows every class that one may name, to 200 MB.
        own = verbs.add_parser(verb, help=text, add_help=False)
        for action in parser_of(verb)._actions:
            if names := [name for name in action.option_strings if name.startswith("--")]:
                added = own.add_argument(*names, dest=action.dest, choices=_choices(action))
                if action.dest in OF_FILES:
                    added.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(program, words[0]))


def _choices(action: argparse.Action) -> list[str] | None:
    """Lists the words that an option takes, where they are few."""
    kinds = [action_type := getattr(action, "_typehint", None), *get_args(action_type)]
    found: list[str] = []
    for kind in kinds:
        if kind is bool:
            found += ["true", "false"]
        elif get_origin(kind) is Literal:
            found += [str(word) for word in get_args(kind)]
    return list(dict.fromkeys(found)) or None


def parser_of(verb: str) -> ArgumentParser:
    """Returns the parser with which a verb reads its options."""
    try:
        if verb in WITHOUT_TRAINER:
            file, name = WITHOUT_TRAINER[verb]
            getattr(import_module(f"gpt_lightning.cli.{file}"), name)([PARSER_ONLY])
        else:
            GPTLightningCLI([verb, PARSER_ONLY], None, RankGuard(), ExitStack())
    except ParserMade as made:
        return made.parser
    raise AssertionError(f"{verb} reads no options")
