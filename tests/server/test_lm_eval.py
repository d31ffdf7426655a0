"""lm_eval gives a served model the scores that it gives its export."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
pytest.importorskip("tenacity")

from lm_eval.tasks import TaskManager  # noqa: E402

from gpt_lightning.checkpoint.checkpoint import load_model  # noqa: E402
from gpt_lightning.data.tokenizer import load_tokenizer  # noqa: E402
from tests.huggingface.test_ecosystem import exported, write_questions  # noqa: E402
from tests.server.in_process import serving, small_served  # noqa: E402

CONTEXT = 64


@pytest.mark.slow
def test_lm_eval_gives_a_served_model_the_scores_of_its_export(tmp_path: Path) -> None:
    checkpoint, folder = exported(tmp_path, "llama", load_tokenizer("bytes"))
    write_questions(tmp_path / "task")
    model, tokenizer = load_model(checkpoint)

    def scores(name: str, **options: Any) -> list[list[float]]:
        found = lm_eval.simple_evaluate(
            model=name,
            model_args=options,
            tasks=["own_questions", "own_text"],
            task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False),
            batch_size=2 if name == "local-completions" else 1,
            bootstrap_iters=0,
        )["samples"]
        rows = [row for task in ("own_questions", "own_text") for row in found[task]]
        texts = sorted(rows, key=lambda row: (row["doc_id"], len(row["resps"])))
        return [[value for (answer,) in row["resps"] for value in numbers(answer)] for row in texts]

    def numbers(answer: Any) -> list[float]:
        return [float(value) for value in answer] if isinstance(answer, tuple | list) else [float(answer)]

    with serving([small_served(model=model, tokenizer=tokenizer)]) as address:
        ours = scores(
            "local-completions",
            base_url=f"{address}/v1/completions",
            model="small",
            tokenizer=str(folder),
            tokenizer_backend="huggingface",
            max_length=CONTEXT + 2,  # lm_eval keeps a place for the first token, and one for the next
        )
    theirs = scores("hf", pretrained=str(folder), device="cpu", dtype="float32")
    assert len(ours) == len(theirs) == 9
    for served, exported_ in zip(ours, theirs):
        assert served == pytest.approx(exported_, abs=1e-4)
