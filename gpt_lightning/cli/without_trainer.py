"""The verbs that need no Trainer, and start without waiting for Lightning: a module each."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from gpt_lightning.cli.noise import quiet
from gpt_lightning.cli.parser import complaint_in, shorten
from gpt_lightning.cli.start import without_collector
from gpt_lightning.exit_codes import INTERRUPTED, WRITE_FAILED

# What each calls with the words after the verb.
WITHOUT_TRAINER = {
    "generate": ("gpt_lightning.cli.generate", "run_generate"),
    "consolidate": ("gpt_lightning.cli.consolidate", "run_consolidate"),
    "import-hf": ("gpt_lightning.cli.convert", "run_import"),
    "export-hf": ("gpt_lightning.cli.convert", "run_export"),
}


def run_without_trainer(verb: str, words: list[str]) -> None:
    quiet()
    with _in_order():
        module, name = WITHOUT_TRAINER[verb]
        with without_collector():
            function: Callable[[list[str]], None] = getattr(import_module(module), name)
        function(words)


@contextmanager
def _in_order() -> Iterator[None]:
    """What is known to go wrong ends the program with a line and a code, the rest with a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        # Here, since PyTorch comes with it, for which an error in the options should not wait.
        from gpt_lightning.checkpoint.files import CheckpointWriteError

        is_write_error = isinstance(error, CheckpointWriteError)
        # Of the remedies, the option is one of runs alone.
        line = str(error).replace(" (checkpoint.dirpath)", "") if is_write_error else _line_of(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(WRITE_FAILED if is_write_error else 2)


def _line_of(error: Exception) -> str | None:
    """None for a fault of the program."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; name a place that can be used"
    complaint = complaint_in(error) if isinstance(error, ValueError) else None
    return None if complaint is None else shorten(str(complaint))
