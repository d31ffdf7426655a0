"""Finds what `tasks` names: a user's files of questions, and tasks of lm-eval."""

from collections.abc import Sequence
from pathlib import Path

from gpt_lightning.evaluation.harness import HarnessTasks
from gpt_lightning.evaluation.multiple_choice import ItemTask, Result
from gpt_lightning.evaluation.scoring import Scorer
from gpt_lightning.exit_codes import UserError

Task = ItemTask | HarnessTasks


def open_tasks(names: Sequence[str] | str, limit: int | None = None) -> list[Task]:
    """Reads the tasks named, also in one text with commas between them; `limit` cuts each of them."""
    listed = names.split(",") if isinstance(names, str) else names
    listed = [stripped for name in listed if (stripped := name.strip())]
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} is below 1; raise it, or leave it out for all questions")
    own = [name for name in listed if name.endswith(".jsonl")]
    tasks: list[Task] = [ItemTask(Path(name).expanduser(), limit) for name in own]
    if of_harness := [name for name in listed if name not in own]:
        tasks.append(HarnessTasks(of_harness, limit))
    names = [name for task in tasks for name in task.names]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"tasks={','.join(listed)} has two tasks of the name {name}; rename one file")
    return tasks


def prepare(tasks: Sequence[Task], scorer: Scorer) -> None:
    """Finds what the model cannot take, before anything is scored."""
    for task in tasks:
        task.prepare(scorer)


def evaluate(tasks: Sequence[Task], scorer: Scorer) -> list[Result]:
    """Returns the same results on all ranks, which call it together."""
    results = []
    for task in tasks:
        found = task.evaluate(scorer)
        results += found if isinstance(found, list) else [found]
    return results
