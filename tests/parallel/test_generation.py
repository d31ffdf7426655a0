"""Tensor-parallel peers write one text together: that of a single process."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning.callbacks.prediction_writer import PredictionWriter
from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.kernels.choose import PIN
from tests.distributed import run_ranks
from tests.parallel.runs import Recorder, RecordingModule, Run, build, run_everywhere, trainer_of
from tests.shapes import MIXED

pytestmark = pytest.mark.slow
CONFIG = {**MIXED, "n_heads": 8, "n_kv_heads": 4, "dropout": 0.1}
PROMPTS = ["The cat", "A dog sees the", "", "river", "and the old", "The", "with a small red house"]
GREEDY = GenerationConfig(max_new_tokens=20, do_sample=False)  # longer than the context of 15
SAMPLED = GenerationConfig(max_new_tokens=20, temperature=1.1, top_k=40, top_p=0.95, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def trained(shared_corpus: Path) -> Path:
    path = shared_corpus.parent / "trained.ckpt"
    run_everywhere(Run(2, 2, steps=12, save_to=str(path), config=CONFIG), shared_corpus)
    return path


def predict(run: Run, corpus: Path, checkpoint: Path, settings: GenerationConfig, output: Path) -> None:
    module, datamodule = build(corpus, run)
    module.generation = settings
    datamodule.prompts = PROMPTS
    trainer = trainer_of(run, corpus.parent, Recorder(None))
    with output.with_suffix(".txt").open("w") as stream:
        trainer.callbacks.append(PredictionWriter(output, stream, Checkpoint(checkpoint, {})))
        trainer.predict(module, datamodule, ckpt_path=checkpoint, return_predictions=False, weights_only=True)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tp, dp", [(2, 1), (2, 2), (4, 1)])
def test_the_text_is_that_of_one_process(
    tp: int, dp: int, settings: GenerationConfig, shared_corpus: Path, trained: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"data": {}, "config": CONFIG}
    files = [tmp_path / "one.jsonl", tmp_path / "many.jsonl"]
    run_ranks(predict, 1, Run(**options), shared_corpus, trained, settings, files[0])
    sequence_parallel = {"sequence_parallel": dp == 1}  # which leaves generation as it is
    run = Run(tp, dp, strategy=sequence_parallel, **options)
    run_ranks(predict, tp * dp, run, shared_corpus, trained, settings, files[1])
    assert files[0].read_text() == files[1].read_text()
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert any(row["completion_tokens"] == 20 for row in rows)


class Rounding(RecordingModule):
    """Peers whose logits differ in the last bits, as those of a GPU may: here by more, to be seen at once."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        head = self.model.lm_head
        rank = self.trainer.global_rank
        head.register_forward_hook(lambda module, inputs, logits: logits.roll(rank, dims=-1))
        return super().predict_step(batch, batch_idx)


def predict_with_rounding(run: Run, corpus: Path, checkpoint: Path) -> list[Any]:
    module, datamodule = build(corpus, run)
    module.__class__ = Rounding
    module.generation = GREEDY
    datamodule.prompts = PROMPTS[:3]
    trainer = trainer_of(run, corpus.parent, Recorder(None))
    (rows,) = trainer.predict(module, datamodule, ckpt_path=checkpoint, weights_only=True)
    return [row["completion"] for row in rows]


def test_peers_take_the_first_ones_token(shared_corpus: Path, trained: Path) -> None:
    """With a choice of its own per peer, they would read different tokens into the cache they share."""
    one = run_ranks(predict_with_rounding, 1, Run(config=CONFIG), shared_corpus, trained)[0]
    two = run_ranks(predict_with_rounding, 2, Run(2, 1, config=CONFIG), shared_corpus, trained)
    assert two == [one, one]


def test_the_check_of_finite_logits_stops_all_peers(shared_corpus: Path, trained: Path) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["state_dict"]["model.ln_f.bias"][0] = torch.nan
    broken = trained.with_name("broken.ckpt")
    torch.save(checkpoint, broken)
    for message in run_ranks(message_of_prediction, 2, Run(2, 1, config=CONFIG), shared_corpus, broken):
        assert "not finite" in message


def message_of_prediction(run: Run, corpus: Path, checkpoint: Path) -> str:
    with pytest.raises(ValueError) as error:
        predict(run, corpus, checkpoint, GREEDY, corpus.with_name(f"{torch.get_num_threads()}.jsonl"))
    return str(error.value)


def kernel_of_a_predict(run: Run, corpus: Path, checkpoint: Path) -> tuple[str | None, list[Any]]:
    """The kernel of a rank that would choose another than its peer, and its texts."""
    os.environ[PIN] = "packed" if os.environ.get("RANK", "0") == "0" else "linear"
    module, datamodule = build(corpus, run)
    module.generation, datamodule.prompts = GREEDY, PROMPTS[:3]
    trainer = trainer_of(run, corpus.parent, Recorder(None))
    (rows,) = trainer.predict(module, datamodule, ckpt_path=checkpoint, weights_only=True)
    return module._kernel, [row["completion"] for row in rows]


def test_replicas_take_the_first_ones_kernel(shared_corpus: Path, trained: Path) -> None:
    """With another the same prompt could be rounded to another token on another rank."""
    one = run_ranks(kernel_of_a_predict, 1, Run(config=CONFIG), shared_corpus, trained)[0]
    ranks = run_ranks(kernel_of_a_predict, 2, Run(1, 2, config=CONFIG), shared_corpus, trained)
    assert one[0] == "packed" and [kernel for kernel, _ in ranks] == ["packed"] * 2
    assert sorted(text for _, texts in ranks for text in texts) == sorted(one[1])
