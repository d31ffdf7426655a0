"""Runs `evaluate`, which asks a trained model the questions of files and of lm-eval's tasks."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt_lightning.callbacks.terminal import for_readers
from gpt_lightning.checkpoint.atomic import written_file
from gpt_lightning.cli.errors import say
from gpt_lightning.cli.main import VERBS
from gpt_lightning.cli.model_options import add_model_options, choose_device, open_model
from gpt_lightning.cli.parser import PlainParser
from gpt_lightning.evaluation.multiple_choice import Result
from gpt_lightning.evaluation.scoring import Scorer
from gpt_lightning.evaluation.tasks import evaluate, open_tasks, prepare
from gpt_lightning.exit_codes import UserError


def run_evaluate(words: list[str]) -> None:
    options = _parser().parse_args(words)
    device = choose_device(options.device)
    output = _checked_output(options.output)
    tasks = open_tasks(options.tasks, options.limit)
    if not tasks:
        raise UserError(f"tasks={options.tasks} names none; give files of questions, such as mine.jsonl")
    if options.batch_tokens < 1:
        raise UserError(f"batch_tokens={options.batch_tokens} is below 1; raise it")
    _, model, tokenizer = open_model(options, device)
    scorer = Scorer(model, tokenizer, options.batch_tokens)
    prepare(tasks, scorer)
    results = evaluate(tasks, scorer)
    print(for_readers(_table(results), sys.stdout))
    if output is not None:
        _write(results, output)
        say(f"items: {output}")


def _parser() -> PlainParser:
    parser = PlainParser(prog="gpt-lightning evaluate", description=VERBS["evaluate"])
    help = "Files of questions (.jsonl) and names of lm-eval's tasks, with commas between them."
    parser.add_argument("--tasks", type=list[str] | str, required=True, help=help)
    parser.add_argument("--output", type=str, help="A file for each item's figures, as JSON lines.")
    parser.add_argument("--limit", type=int, help="Ask the first so many questions of each task.")
    help = "Tokens of a pass, with padding: more are faster and take more memory."
    parser.add_argument("--batch_tokens", type=int, default=8192, help=help)
    add_model_options(parser)
    return parser


def _checked_output(given: str | None) -> Path | None:
    """Finds a mistake in the file's name now rather than after the evaluation."""
    if given is None:
        return None
    path = Path(given).expanduser()
    if not given or path.exists() and not path.is_file() or not path.parent.is_dir():
        raise UserError(f"output={given!r} is no file that can be written; name one, such as items.jsonl")
    return path


def _write(results: Sequence[Result], path: Path) -> None:
    with written_file(path) as file:
        for result in results:
            for row in result.rows:
                file.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")


def _table(results: Sequence[Result]) -> str:
    """Lays out each task's figures, with their standard errors."""
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    head = ["task", "items", *names]
    lines = [[result.task, _count(result), *_figures(result, names)] for result in results]
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in [head, *lines])


def _count(result: Result) -> str:
    return f"{len(result.rows):,}" if result.rows else "-"  # of a group, whose tasks stand above


def _figures(result: Result, names: Sequence[str]) -> list[str]:
    return [_figure(result.metrics.get(name), result.errors.get(name, math.nan)) for name in names]


def _figure(value: float | None, error: float) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ±{error:.4f}"
