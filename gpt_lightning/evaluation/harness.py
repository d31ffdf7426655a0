"""Lends a model to lm-eval, whose tasks then ask it for log-probabilities."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_lightning.data.tokenizer import first_line
from gpt_lightning.evaluation.multiple_choice import Result
from gpt_lightning.evaluation.scoring import Pair, Scorer, encode_pairs
from gpt_lightning.exit_codes import UserError

_FEWSHOT_SEED = 1234  # lm-eval's own default


class HarnessTasks:
    """Are tasks and groups of lm-eval, by name, or by the YAML file that describes one."""

    def __init__(self, names: Sequence[str], limit: int | None = None) -> None:
        self._limit = limit
        self._tasks = _load(names)

    def prepare(self, scorer: Scorer) -> None:
        """Does nothing: lm-eval makes its questions when it asks them."""

    def evaluate(self, scorer: Scorer) -> list[Result]:
        from lm_eval.evaluator import evaluate

        found = evaluate(_Answers(scorer), self._tasks, limit=self._limit, bootstrap_iters=0)
        assert found is not None
        names = [*self._tasks["tasks"], *self._tasks.get("groups", {})]
        return [_result(name, found["results"][name], found["samples"].get(name, [])) for name in names]


class _Answers:
    """Answers as a model of lm-eval's does. Every rank asks all, and the Scorer deals it out."""

    rank, world_size = 0, 1

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        pairs = encode_pairs(self._scorer.tokenizer, [request.args for request in requests])
        return self._scores(pairs, requests)

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
        for number, (log_probability, _) in zip(owners, self._scores(pairs, [requests[n] for n in owners])):
            sums[number] += log_probability
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        raise UserError(
            f"tasks={requests[0].task_name} has the model write texts; choose tasks that score given ones"
        )

    def _scores(self, pairs: Sequence[Pair], requests: Sequence[Any]) -> list[tuple[float, bool]]:
        for pair, request in zip(pairs, requests):
            self._scorer.check(pair, f"tasks={request.task_name}, item {request.doc_id}")
        return [(score.log_probability, score.is_greedy) for score in self._scorer.score(pairs)]


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
        if comma and isinstance(value, (int, float)):
            kind = metrics if not metric.endswith("_stderr") else errors
            metric = metric.removesuffix("_stderr")
            kind[metric if of_filter == "none" else f"{metric}_{of_filter}"] = float(value)
    return Result(name, metrics, errors, [_row(name, sample) for sample in samples])


def _row(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    metrics = {name: sample[name] for name in sample["metrics"]}
    return {
        "task": task,
        "item": sample["doc_id"],
        "arguments": sample["arguments"],
        "answer": sample["target"],
        "log_probabilities": [resp for resp in sample["filtered_resps"]],
        **metrics,
    }
