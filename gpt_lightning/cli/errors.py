"""Says what goes on beside the output, and how the program ends: in one line and a code where it is known."""

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

from lightning_utilities.core.rank_zero import rank_zero_only
from typing_extensions import override

from gpt_lightning.callbacks.terminal import plain_stderr, printable
from gpt_lightning.checkpoint.atomic import NO_SPACE
from gpt_lightning.exit_codes import INTERRUPTED, MISTAKE, TERMINATED, WRITE_FAILED

NOISE = (
    r".*does not have many workers.*",
    r".*exists and is not empty.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*callbacks used to create the checkpoint need to be provided.*",
    r".*torch.distributed is disabled, unavailable or uninitialized.*",
    r".*It is recommended to use .self.log.* when logging on epoch level in distributed setting.*",
)
# And what is no news: a fit says itself what it runs on, its configuration has the seed, and each verb says
# which checkpoint it takes.
ADVERTS = (
    *("💡", "GPU available", "TPU available", "HPU available", "Seed set to"),
    *("Restoring states from", "Restored all states from", "Loaded model weights from"),
)
# What options of some kinds look like, whose names of types say little.
_FORMS = {
    "MixtureSource": "a list such as [{name: novels, files: novels/*.txt, weight: 3}]",
    "dict[int, float]": "a number, or {step: number} from step 0 on, as {0: 1, 1500: 4}",
}


def this_rank() -> int:
    return getattr(rank_zero_only, "rank", 0)  # which Lightning sets, where it is imported


def say(line: str, *, to_copy: bool = False) -> None:
    """Writes a line of the first rank; one `to_copy`, a command, has no time before it in a log either."""
    if this_rank() == 0:
        print(printable(line), file=plain_stderr() if to_copy else sys.stderr, flush=True)


@contextmanager
def one_line_errors(*, is_run: bool = False) -> Iterator[None]:
    """Ends the program with a line and a code after a known error; any other shows its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except SystemExit as error:
        # Lightning makes a plain 1 of a second Ctrl-C.
        sys.exit(INTERRUPTED if isinstance(error.__context__, KeyboardInterrupt) else error.code)
    except Exception as error:
        if (known := _known_in(error)) is None:
            raise
        line, exit_code = known
        if not is_run:
            line = line.replace(" (checkpoint.dirpath)", "")  # an option of runs alone
        if exit_code not in (INTERRUPTED, TERMINATED):  # an end that was asked for is no error
            # Of a rank on its own: the others may not know what it has met.
            line = f"error of rank {this_rank()}: {line}" if this_rank() else f"error: {line}"
        print(printable(line), file=sys.stderr)
        sys.exit(exit_code)


def _known_in(error: BaseException) -> tuple[str, int] | None:
    """Finds what to say of an error or of its cause, and the exit code; None for a fault of the program."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; name a place that can be used", MISTAKE
    known: Any = error
    while known is not None and not hasattr(known, "exit_code"):
        # A logger that cannot write cannot either when it is closed, after the error that tells of it.
        known = known.__context__ if isinstance(known, OSError) else known.__cause__
    if known is None:
        return _exhausted(error.__cause__ or error)  # TensorBoardLogger raises a ValueError from a full disk
    return shorten(str(known)) if known.exit_code == MISTAKE else str(known), known.exit_code


def _exhausted(error: BaseException) -> tuple[str, int] | None:
    """Says what the machine has no more of, as a logger may find before the first step."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return f"{error}; make space", WRITE_FAILED
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return f"{error}; end other processes, or raise the limit (ulimit -u)", WRITE_FAILED
    return None


def shorten(message: str) -> str:
    """Makes a parser's message one line: option, value and what would do, without the nested types tried."""
    of_a_class = r"""Parser key "([\w.]+)":.*?NestedArg\(key='([\w.]+)', val=(.*?)\)"""
    if nested := re.search(of_a_class, message, re.DOTALL):
        option, value = f"{nested[1]}.{nested[2]}", _cut(nested[3].strip("'"), 200)
        return f"{option}={value} is an option of a class; give --{nested[1]} package.Class, too"
    key = re.search(r'Parser key "([\w.]+)"', message)
    given = re.search(r"Given value: (.*)|Got value: (.*)", message)
    expected = re.findall(
        r"Expected (?:an? )?(<class '\w+'>|typing\.Literal\[.*\]|dot import path string)", message
    )
    if key and given and (form := next((form for kind, form in _FORMS.items() if kind in message), None)):
        return f"{key[1]}={_cut(given[1] or given[2], 200)} does not fit; give {form}"
    if key and given and expected:
        kinds = ", ".join(dict.fromkeys(_plain_type(kind) for kind in expected))
        return f"{key[1]}={_cut(given[1] or given[2], 200)} does not fit; give {kinds}"
    return _cut(" ".join(message.split()), 400)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _plain_type(kind: str) -> str:
    """Writes `int` for <class 'int'>, `null` for NoneType, the words themselves for a Literal."""
    text = re.sub(r"<class '(\w+)'>|typing\.Literal\[(.*)\]", r"\1\2", kind)
    return text.replace("NoneType", "null").replace("'", "").replace("dot import path string", "a class path")


def quiet() -> None:
    """Leaves out adverts and warnings of what is meant to be so; what the package reports goes to stderr."""
    logging.getLogger("gpt_lightning").setLevel(logging.INFO)
    handler = _ToStderr()
    handler.addFilter(_is_news)
    handler.addFilter(_make_printable)
    for name in ("gpt_lightning", "lightning.pytorch", "lightning.fabric", *_loggers_of_torch()):
        logging.getLogger(name).handlers = [handler]
    show_warnings_in_a_line()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)


def _loggers_of_torch() -> list[str]:
    """Lists those that write themselves, unless somebody asks for them in all detail."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "torch"]
    return [] if "TORCH_LOGS" in os.environ else [name for name in names if logging.getLogger(name).handlers]


def show_warnings_in_a_line() -> None:
    """Leaves out where in the program a warning comes from, which says nothing to who uses it."""
    warnings.showwarning = _show_warning


class _ToStderr(logging.Handler):
    """Writes to what stderr is at the time: beside a progress bar, that is above it."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _is_news(record: logging.LogRecord) -> bool:
    """Tells what stays: of Lightning's, no advert, and what is no warning from the first rank alone."""
    is_lightnings = record.name.partition(".")[0] == "lightning"
    is_anothers = is_lightnings and record.levelno <= logging.INFO and this_rank() != 0
    text = re.sub(r"^\[rank: \d+\] ", "", record.getMessage())
    return not is_anothers and not text.startswith(ADVERTS)


def _make_printable(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    is_torchs = record.name.partition(".")[0] == "torch" and record.levelno >= logging.WARNING
    record.msg, record.args = printable(_warning(text) if is_torchs else text), ()
    return True


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(printable(_warning(str(message))), file=file or sys.stderr)


def _warning(text: str) -> str:
    """Makes a line of it, without the place in torch's sources."""
    text = re.sub(r"\(Triggered internally at [^)]*\)", "", text)
    return f"warning: {' '.join(text.split()).removeprefix('warning: ')}"


def show_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Shows a traceback, in whose message anything may stand."""
    print(printable("".join(traceback.format_exception(error))), end="", file=sys.stderr)
