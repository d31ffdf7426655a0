"""Lends a model to lm-eval, whose tasks then ask it for log-probabilities."""

import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from statistics import fmean
from typing import Any

from gpt_lightning.data.hub import first_line
from gpt_lightning.evaluation.multiple_choice import Result, standard_error
from gpt_lightning.evaluation.scoring import Pair, Scorer, encode_pairs
from gpt_lightning.exit_codes import UserError

_FEWSHOT_SEED = 1234  # lm-eval's own default


class HarnessTasks:
    """Are tasks and groups of lm-eval, by name, or by the YAML file that describes one."""

    def __init__(self, names: Sequence[str], limit: int | None = None) -> None:
        self._limit = limit
        self._tasks = _load(names)

    @property
    def names(self) -> list[str]:
        return [*self._tasks["tasks"], *self._tasks.get("groups", {})]

    def prepare(self, scorer: Scorer) -> None:
        """Has lm-eval make its questions once; raises UserError for one that the model cannot take."""
        for task in self._tasks["tasks"].values():
            with _without_bars():
                task.build_all_requests(limit=self._limit, rank=0, world_size=1)
            requests = [each for each in task.instances if each.request_type == "loglikelihood"]
            for pair, request in zip(_pairs(scorer, requests), requests):
                scorer.check(pair, f"tasks={request.task_name}, item {request.doc_id}")

    def evaluate(self, scorer: Scorer) -> list[Result]:
        from lm_eval.evaluator import evaluate

        with _without_bars():
            found = evaluate(_Answers(scorer), self._tasks, limit=self._limit, bootstrap_iters=0)
        assert found is not None
        figures, samples = found["results"], found["samples"]
        results = [_result(name, figures.get(name, {}), samples.get(name, [])) for name in self.names]
        return [result for result in results if result.metrics]  # of groups, those that have means of all


class _Answers:
    """Answers as a model of lm-eval's does. Every rank asks all, and the Scorer deals it out."""

    rank, world_size = 0, 1

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        return [(*score,) for score in self._scorer.score(_pairs(self._scorer, requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Scores whole texts, each window of which is read once, after the last token of the one before."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        tokenizer, pairs, owners = self._scorer.tokenizer, [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=tokenizer.encode(request.args[0]),
                prefix_token=tokenizer.eos_token_id,
                max_seq_len=self._scorer.window,
                context_len=1,
            )
            for window in windows:
                pairs.append(Pair(*make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, score in zip(owners, self._scorer.score(pairs)):
            sums[number] += score.log_probability
        return sums


def _pairs(scorer: Scorer, requests: Sequence[Any]) -> list[Pair]:
    return encode_pairs(scorer.tokenizer, [request.args for request in requests])


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hides lm-eval's own progress bars, which cannot be turned off."""
    with redirect_stderr(io.StringIO()):
        yield


def _load(names: Sequence[str]) -> Any:
    """Returns lm-eval's tasks, ready to be asked again and again."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        problem = f"tasks={names[0]} is no .jsonl file, and lm-eval's tasks need its package"
        raise UserError(f"{problem}; pip install 'gpt_lightning[ecosystem]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    are_files = all(name.endswith((".yaml", ".yml")) for name in names)
    manager = TaskManager(include_defaults=not are_files)  # thousands of files
    for name in names:
        is_file = Path(name).expanduser().is_file()
        if name.endswith((".yaml", ".yml")) and not is_file:
            raise UserError(f"tasks={name} does not exist; check the path")
        if not is_file and name not in manager.all_tasks:
            remedy = "`lm_eval ls tasks` lists them, and a file of your own questions ends in .jsonl"
            raise UserError(f"tasks={name} is no task of lm-eval; {remedy}")
    try:
        tasks = manager.load([str(Path(name).expanduser()) for name in names])
    except Exception as error:  # the hub, data sets and tasks' code each raise their own kinds
        problem = f"tasks={','.join(names)} cannot be loaded ({first_line(error)})"
        raise UserError(f"{problem}; check the network, or what the task names") from error
    for name, task in tasks["tasks"].items():
        if task.get_config("output_type") == "generate_until":
            raise UserError(f"tasks={name} has the model write texts; choose tasks that score given ones")
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(_FEWSHOT_SEED)
    return tasks


def _result(name: str, found: dict[str, Any], samples: Sequence[dict[str, Any]]) -> Result:
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in found.items():
        metric, comma, of_filter = key.partition(",")
        if not comma or not isinstance(value, (int, float)) or metric.endswith("_stderr"):
            continue
        shown = metric if of_filter == "none" else f"{metric}_{of_filter}"
        metrics[shown] = float(value)
        values = [sample.get(metric) for sample in samples if sample["filter"] == of_filter]
        numbers = [float(each) for each in values if isinstance(each, (int, float))]
        if numbers and len(numbers) == len(values) and math.isclose(fmean(numbers), value):
            errors[shown] = standard_error(numbers)
    return Result(name, metrics, errors, [_row(name, sample) for sample in samples])


def _row(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    responses = sample["filtered_resps"]
    return {
        "task": task,
        "item": sample["doc_id"],
        "arguments": sample["arguments"],
        "answer": sample["target"],
        "log_probabilities": [round(each[0] if isinstance(each, tuple) else each, 6) for each in responses],
        **{name: sample[name] for name in sample["metrics"]},
    }
