"""The parser of the verbs that Lightning runs: of the Trainer's many options, its help page shows a few."""

import argparse
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from gpt_lightning.cli import imports as cli_imports
from gpt_lightning.cli.parser import PlainParser, option_line

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


class Parser(PlainParser, LightningArgumentParser):
    """Lightning's own, with our manners."""

    arguments = "[--config FILE] [--option value ...]"
    show_all = False
    instantiators: list[Any] | None = None

    @override
    def instantiate_classes(self, cfg: Namespace, **kwargs: Any) -> Namespace:
        # Lightning calls this old name; the new one takes functions that build a class in their own way.
        return self.instantiate(cfg, instantiators=self.instantiators, **kwargs)

    @override
    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """One or two lines an option; Lightning's own page has several hundred."""
        imports = option_line(f"{cli_imports.OPTION} PACKAGE", cli_imports.HELP) + "\n"
        if Parser.show_all:
            return super(PlainParser, self).format_help(formatter) + "\n" + imports
        return f"{super().format_help(formatter)}\n{imports}\nEvery option, with its type: --help-all\n"

    @override
    def _is_shown(self, action: argparse.Action) -> bool:
        name = action.dest
        if name.startswith("trainer.") and name not in COMMON_TRAINER_OPTIONS:
            return False
        return super()._is_shown(action) and name not in HIDDEN
