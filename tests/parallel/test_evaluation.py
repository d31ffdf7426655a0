"""Replicas share the questions, tensor-parallel peers answer them together: as one process does."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.callbacks import evaluation
from gpt_lightning.callbacks.evaluation import Evaluation
from gpt_lightning.evaluation.scoring import Scorer
from gpt_lightning.parallel.ranks import gathered
from tests.conftest import WORDS
from tests.distributed import run_ranks
from tests.parallel.runs import Recorder, Run, build, trainer_of
from tests.shapes import MIXED

pytestmark = pytest.mark.slow
CONFIG = {**MIXED, "n_heads": 8, "n_kv_heads": 4}


@pytest.fixture(scope="module")
def questions(shared_corpus: Path) -> Path:
    path = shared_corpus.with_name("mine.jsonl")
    rows = [
        {"question": " ".join(WORDS[n : n + n % 5]), "choices": WORDS[n : n + 2 + n % 3], "answer": n % 2}
        for n in range(13)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def asked(run: Run, corpus: Path, questions: Path | None) -> dict[str, Any]:
    """Runs in a rank: what it scored itself, what it knows after each evaluation, and the losses."""
    module, datamodule = build(corpus, run)
    recorder = Recorder(None)
    trainer = trainer_of(run, corpus.parent, recorder)
    own: list[list[int]] = []
    scores: list[list[float]] = []
    if questions is not None:
        callback = Evaluation([str(questions)], every_n_steps=2, batch_tokens=60)
        trainer.callbacks.append(callback)
        score = Scorer.score

        def noted(scorer: Scorer, pairs: Any) -> Any:
            found = score(scorer, pairs)
            scores.append([each.log_probability for each in found])
            return found

        def gather(share: Any) -> list[Any]:
            own.append(sorted(share))
            return gathered(share)

        setattr(Scorer, "score", noted)  # in this process, which ends with the test
        setattr(evaluation, "gathered", gather)
    trainer.fit(module, datamodule)
    known = {name: float(value) for name, value in trainer.callback_metrics.items() if "eval/" in name}
    return {"own": own, "scores": scores, "known": known, "losses": recorder.losses}


@pytest.mark.parametrize("tp, dp", [(1, 2), (2, 1), (2, 2)])
def test_ranks_answer_as_one_process_does(tp: int, dp: int, shared_corpus: Path, questions: Path) -> None:
    options: dict[str, Any] = {"steps": 4, "seq_len": 16, "config": CONFIG}
    (one,) = run_ranks(asked, 1, Run(**options), shared_corpus, questions)
    run = Run(tp, dp, strategy={"sequence_parallel": tp > 1}, **options)
    several = run_ranks(asked, tp * dp, run, shared_corpus, questions)
    plain = run_ranks(asked, tp * dp, run, shared_corpus, None)
    for rank, (found, without) in enumerate(zip(several, plain)):
        assert found["losses"] == without["losses"]
        assert found["scores"] == several[0]["scores"] and found["known"] == several[0]["known"]
        assert found["own"] == several[rank - rank % tp]["own"]
    assert len(one["scores"]) == 2 and len(one["losses"]) == 4
    for number, scores in enumerate(one["scores"]):
        assert several[0]["scores"][number] == pytest.approx(scores, abs=1e-4)
        shares = [several[rank]["own"][number] for rank in range(0, tp * dp, tp)]
        assert all(shares) and sorted(sum(shares, [])) == list(range(len(scores)))
    assert several[0]["known"] == one["known"]
