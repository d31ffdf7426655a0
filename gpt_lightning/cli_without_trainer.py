"""The verbs that need no Trainer: a module each, imported when its verb is used."""

from collections.abc import Callable
from importlib import import_module

# What each calls with the words after the verb.
WITHOUT_TRAINER = {
    "consolidate": ("gpt_lightning.cli_consolidate", "run_consolidate"),
    "import-hf": ("gpt_lightning.cli_huggingface", "run_import"),
    "export-hf": ("gpt_lightning.cli_huggingface", "run_export"),
}


def run_without_trainer(verb: str, words: list[str]) -> None:
    module, name = WITHOUT_TRAINER[verb]
    function: Callable[[list[str]], None] = getattr(import_module(module), name)
    function(words)
