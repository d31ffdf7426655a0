"""Answers at once what can be, before the slow imports, and runs every verb."""

import difflib
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module

from gpt_lightning import __version__
from gpt_lightning.callbacks.start_signals import StartSignals, first_rank
from gpt_lightning.callbacks.terminal import printable, steady_streams
from gpt_lightning.exit_codes import MISTAKE

VERBS = {
    "fit": "train a GPT (without options: the quickstart)",
    "validate": "loss and perplexity on the validation split",
    "test": "the same on the test files",
    "predict": "continue prompts with a trained model",
    "generate": "print text as it is written; interactive without a prompt",
    "serve": "answer over HTTP as OpenAI does, with a page to try the model",
    "evaluate": "answer multiple-choice questions, of files or of lm-eval's tasks",
    "report": "write a page on a run, or on several side by side: curves, samples, options",
    "prepare": "tokenize the texts into the cache, without training",
    "sweep": "fit with several values of options, and say which are the best",
    "plan": "say what a fit will take: memory, time, messages, disk, and what would make it fit",
    "kernels": "measure anew by which kernels a CPU generates the fastest",
    "consolidate": "make one file of a sharded checkpoint",
    "import-hf": "make a checkpoint of a Hugging Face model, by folder or hub name",
    "export-hf": "make a Hugging Face folder of a checkpoint",
    "export-gguf": "make a file of a checkpoint that llama.cpp runs",
}
# What other programs call them.
ELSEWHERE = {"train": "fit", "pretrain": "fit", "finetune": "fit", "sample": "generate", "chat": "generate"}
HELP = """usage: gpt-lightning VERB [--config FILE] [--option value ...]

Train a GPT from your own text, and sample from it.

{verbs}

  gpt-lightning fit
  gpt-lightning fit --config shakespeare --data.train_files '["novels/*.txt"]'
  gpt-lightning predict --data.prompts '["Once upon a time"]'

The options of a verb: gpt-lightning VERB --help
Completion in bash:    source <(gpt-lightning --print_shtab bash)
"""
NO_FITS = {"-h", "--help", "--help-all", "--print_config"}
# The verbs that need no Trainer of their own: their file and function.
WITHOUT_TRAINER = {
    "generate": ("generate", "run_generate"),
    "serve": ("serve", "run_serve"),
    "evaluate": ("evaluate", "run_evaluate"),
    "sweep": ("sweep", "run_sweep"),
    "report": ("report", "run_report"),
    "plan": ("plan", "run_plan"),
    "kernels": ("kernels", "run_kernels"),
    "consolidate": ("convert", "run_consolidate"),
    "import-hf": ("convert", "run_import"),
    "export-hf": ("convert", "run_export"),
    "export-gguf": ("convert", "run_export_gguf"),
}


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    with steady_streams(stdout=words[:1] != ["generate"], is_log=words[:1] == ["fit"]):
        _run(words)


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(HELP.format(verbs="\n".join(f"  {verb:12} {text}" for verb, text in VERBS.items())), end="")
    elif words[0] == "--version":
        print(f"gpt_lightning {__version__}")
    elif words[0].partition("=")[0] == "--print_shtab":
        _run_verb([*words[0].split("=")[1:], *words[1:]], "completion", "print_completion")
    elif words[0] not in VERBS:
        _refuse(words)
    elif words[0] in WITHOUT_TRAINER:
        file, name = WITHOUT_TRAINER[words[0]]
        # The others write little, or handle signals themselves.
        with StartSignals(words[0]) if file == "convert" else nullcontext() as signals:
            _run_verb(words[1:], file, name, signals.check if signals else lambda: None)
    else:
        _show_life(words)
        with StartSignals(words[0]) as signals:
            _run_verb(words, "app", "run", signals.check)


def _show_life(words: list[str]) -> None:
    """Says that a fit starts, as the imports alone may take ten seconds on a busy machine."""
    if words[0] == "fit" and first_rank() and not {word.partition("=")[0] for word in words} & NO_FITS:
        print(f"gpt_lightning {__version__}: starting", file=sys.stderr, flush=True)


def _run_verb(
    words: list[str], file: str, name: str, after_imports: Callable[[], None] = lambda: None
) -> None:
    from gpt_lightning.cli.errors import one_line_errors, quiet, show_fault, show_warnings_in_a_line

    show_warnings_in_a_line()
    with one_line_errors(is_run=file == "app"):
        with without_collector():
            function = getattr(import_module(f"gpt_lightning.cli.{file}"), name)
        after_imports()
        quiet()
        sys.excepthook = show_fault
        function(words)


def _refuse(words: list[str]) -> None:
    if words[0].startswith("-"):
        reason = f"{words[0]} stands before the verb; write e.g. gpt-lightning fit {' '.join(words[:2])}"
    else:
        reason = f"{words[0]!r} is no verb; choose one of {', '.join(VERBS)}"
        close = difflib.get_close_matches(words[0], VERBS, n=1)
        meant = ELSEWHERE.get(words[0]) or next(iter(close), None)
        reason += f"\ndid you mean {meant}?" if meant else ""
    print(printable(f"error: {reason}"), file=sys.stderr)
    sys.exit(MISTAKE)


@contextmanager
def without_collector() -> Iterator[None]:
    """Surrounds the slow imports: to look for garbage in what they leave takes a third of the start."""
    n_modules, was_on = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
        if len(sys.modules) > n_modules:
            gc.freeze()
