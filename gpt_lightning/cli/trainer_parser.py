"""Parses the options of a verb that Lightning runs, with a short help page and trusted class paths only."""

import argparse
import codecs
import locale
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from gpt_lightning.cli.parser import ALLOW_IMPORT, LAUNCHERS, TRUSTED_PARTS, PlainParser, option_line
from gpt_lightning.exit_codes import UserError

ALLOW_IMPORT_HELP = "Import class paths from this package too; may be repeated, and stands in no file"
# The Trainer's options that most runs use; the other fifty stand in --help-all.
COMMON_TRAINER_OPTIONS = (
    "accelerator strategy devices precision max_steps max_epochs max_time val_check_interval "
    "limit_val_batches log_every_n_steps accumulate_grad_batches gradient_clip_val "
    "default_root_dir fast_dev_run"
).split()


class TrainerParser(PlainParser, LightningArgumentParser):
    """Gives Lightning's parser our manners; of the Trainer's many options, its help page shows a few."""

    arguments = "[--config FILE] [--option value ...]"
    show_all = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        register_type(torch.device)  # else config.yaml says that it cannot, as of StochasticWeightAveraging's

    @override
    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """Gives one or two lines to an option; Lightning's own page has several hundred."""
        imports = option_line(f"{ALLOW_IMPORT} PACKAGE", ALLOW_IMPORT_HELP) + "\n"
        if self.show_all:
            return super(PlainParser, self).format_help(formatter) + "\n" + imports
        return f"{super().format_help(formatter)}\n{imports}\nEvery option, with its type: --help-all\n"

    @override
    def _is_shown(self, action: argparse.Action) -> bool:
        group, _, name = action.dest.partition(".")
        if group == "trainer" and name and name not in COMMON_TRAINER_OPTIONS:
            return False
        return super()._is_shown(action) and group not in ("weights_only", "return_predictions")


@contextmanager
def limited_imports(words: list[str]) -> Iterator[list[str]]:
    """Yields the command line without `--allow_import`, whose packages are then trusted like TRUSTED_PARTS.

    It is read from the command line and nowhere else: a file that could allow itself would be no wall. A
    class path that is refused is not imported.
    """
    packages, rest = [], []
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name != ALLOW_IMPORT:
            rest.append(word)
        else:
            packages.append(_checked_package(value if equals else next(remaining, "")))
    set_parsing_settings(
        import_path_denylist=["*", *LAUNCHERS],
        import_path_allowlist=[*TRUSTED_PARTS, *packages],
        # A mapping under an option that takes anything stays one, whatever keys it has.
        instantiate_subclass_spec_in_any=False,
    )
    try:
        yield rest
    finally:
        set_parsing_settings(import_path_denylist=packages)


@contextmanager
def files_in_utf8() -> Iterator[None]:
    """Has configuration files read in UTF-8, whatever the locale: jsonargparse opens them in its encoding."""
    former = locale.setlocale(locale.LC_CTYPE)
    if codecs.lookup(locale.getencoding()).name != "utf-8":
        for name in ("C.UTF-8", "C.utf8", "en_US.UTF-8", ".UTF-8"):
            with suppress(locale.Error):
                locale.setlocale(locale.LC_CTYPE, name)
                break
    try:
        yield
    finally:
        locale.setlocale(locale.LC_CTYPE, former)


def _checked_package(value: str) -> str:
    if not value or not all(part.isidentifier() for part in value.split(".")):
        raise UserError(f"{ALLOW_IMPORT}={value} names no package; write e.g. {ALLOW_IMPORT} my_package")
    if value.split(".")[0] == "jsonargparse":
        raise UserError(f"{ALLOW_IMPORT}={value} would let a file decide what is imported; leave it out")
    return value
