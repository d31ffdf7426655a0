"""Runs `generate`, which writes text as it is drawn, of one prompt or of one after the other."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from gpt_lightning.checkpoint.atomic import naming
from gpt_lightning.cli.errors import say
from gpt_lightning.cli.main import VERBS
from gpt_lightning.cli.model_options import add_model_options, choose_device, open_model
from gpt_lightning.cli.parser import PlainParser
from gpt_lightning.cli.printer import TextWriter, Written
from gpt_lightning.cli.repl import HELP, Repl, check_shown, handling
from gpt_lightning.cli.short_names import in_full
from gpt_lightning.data.prompts import as_utf8
from gpt_lightning.exit_codes import MISTAKE, TERMINATED, UserError
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.generation.surprise import score_tokens
from gpt_lightning.report.tokens import TokenText, write_tokens
from gpt_lightning.training.scored_text import shown_tokens

PAGE_NAME = "generated.html"


def run_generate(words: list[str]) -> None:
    options = _parser().parse_args(_with_joined_prompt(in_full(words)))
    if sys.stdout is None:
        raise UserError("standard output is closed, where the text would go; leave it open")
    settings = check_shown(GenerationConfig(**options.generation.as_dict()))
    _check_page(options)
    device = choose_device(options.device)
    with handling(signal.SIGTERM, lambda number, frame: sys.exit(TERMINATED)), _ending_without_readers():
        # The newline that ends the last line of any text is not the prompt's.
        prompt = options.prompt if options.prompt != "-" else _without_newline(_stdin().read())
        if prompt is not None:
            prompt = as_utf8(prompt, f"prompt={prompt!r}", "convert it")
            path, writer = _writer(options, device)
            page = _page_beside(path, options.output) if options.show == "html" else None
            written = writer.write(prompt, settings)
            if page is not None:
                _write_page(page, path, writer, written, settings)
        else:
            _read_prompts(_writer(options, device)[1], settings)


def _parser() -> PlainParser:
    parser = PlainParser(prog="gpt-lightning generate", description=VERBS["generate"])
    parser.add_argument("--prompt", type=str, help="The text to continue; - reads it from standard input.")
    add_model_options(parser)
    help = "Read the name of a special token in a prompt, as <|endoftext|>, as that token."
    parser.add_argument("--parse_special_tokens", type=bool, default=False, help=help)
    help = "html: write a page, too, with each token coloured by how surprising it is."
    parser.add_argument("--show", type=Literal["text", "html"], default="text", help=help)
    help = f"The page of --show html; {PAGE_NAME} beside the checkpoint by default."
    parser.add_argument("--output", type=str, help=help)
    parser.add_class_arguments(GenerationConfig, "generation")
    return parser


def _check_page(options: Any) -> None:
    if options.show == "html" and options.prompt is None:
        raise UserError("show=html writes a page of one prompt; give --prompt TEXT")
    if options.output is not None and options.show != "html":
        raise UserError(f"output={options.output} is the page of --show html; add that, or leave it out")


def _page_beside(checkpoint: Path, output: str | None) -> Path:
    """Returns the place of the page, whose folder is made before any text is drawn for it."""
    page = Path(output) if output is not None else checkpoint.parent / PAGE_NAME
    if page.is_dir():
        raise UserError(f"output={output} is a folder; name a file in it, such as {page / PAGE_NAME}")
    with naming(f"output={page}", "give another --output"):
        page.parent.mkdir(parents=True, exist_ok=True)
    return page


def _write_page(
    output: Path, path: Path, writer: TextWriter, written: Written, settings: GenerationConfig
) -> None:
    """Writes how likely the model, alone, finds each token of the prompt and of what it has drawn."""
    texts = []
    for sample in written.samples:
        token_ids = written.prompt + sample
        scored = score_tokens(written.model, token_ids, context_stride=settings.context_stride)
        texts.append(TokenText(shown_tokens(scored, writer.tokenizer), len(written.prompt)))
    with naming(f"output={output}", "give another --output"):
        write_tokens(texts, f"checkpoint: {path}", output)
    say(f"page: {output}")


def _with_joined_prompt(words: list[str]) -> list[str]:
    """Joins --prompt to its text, which may begin as an option does, with one dash."""
    joined: list[str] = []
    for word in words:
        if joined[-1:] == ["--prompt"] and word.startswith("-") and not word.startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _writer(options: Any, device: torch.device) -> tuple[Path, TextWriter]:
    path, model, tokenizer = open_model(options, device)
    output = sys.stdout
    if isinstance(output, io.TextIOWrapper):
        output.reconfigure(errors="replace")  # of characters that the terminal does not have
    return path, TextWriter(model, tokenizer, output, options.parse_special_tokens)


def _read_prompts(writer: TextWriter, settings: GenerationConfig) -> None:
    stdin = _stdin()
    repl = Repl(writer.write, settings)
    if stdin.isatty():
        say(f"{HELP}\n")
        repl.run(_line_editor(stdin), at_terminal=True)
        return
    lines = map(_without_newline, stdin)
    repl.run(lambda: next(lines, None), at_terminal=False)
    if not repl.n_lines:
        raise UserError("standard input holds no line to continue; give --prompt TEXT")
    if repl.n_refused:
        sys.exit(MISTAKE)


def _line_editor(stdin: TextIO) -> Callable[[], str | None]:
    """Reads lines from a terminal, edited and remembered where Python can."""
    with suppress(ImportError):
        import readline  # noqa: F401  # which `input` then uses

    def read() -> str | None:
        try:
            if sys.stdout.isatty():
                return input("> ")
            print("> ", end="", file=sys.stderr, flush=True)
            if line := stdin.readline():
                return _without_newline(line)
        except EOFError:
            pass
        print(file=sys.stderr)
        return None

    return read


def _without_newline(text: str) -> str:
    """Leaves out the newline at the end, and all that Windows puts before newlines."""
    return text.replace("\r\n", "\n").removesuffix("\n")


def _stdin() -> TextIO:
    if sys.stdin is None:
        raise UserError("there is neither a prompt nor a standard input; give --prompt TEXT")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # What is no UTF-8 is found when a prompt is checked.
        encoding = None if sys.stdin.isatty() else "utf-8-sig"
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")
    return sys.stdin


@contextmanager
def _ending_without_readers() -> Iterator[None]:
    """Ends quietly when nobody reads any more, as after `| head`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"the text cannot be written ({error.strerror}); name another place") from error
        # What is still buffered goes nowhere; Python would try it again, and complain, at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.dup2(nowhere, sys.stderr.fileno())
        sys.exit(0)
