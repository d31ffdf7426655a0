"""All prompts in one call of the engine, in one file, and none run twice."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

import gpt_lightning.generation.engine as engine
from gpt_lightning.callbacks.prediction_writer import PredictionWriter
from gpt_lightning.callbacks.progress import StepProgressBar
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.prediction import CompletionCallback

PROMPTS = ["The cat", "", "A dog sees the river and the old house", "x", "and", "The", "né 🙂", "with a small"]
SAMPLED = GenerationConfig(max_new_tokens=12, temperature=1.2, top_k=None)


class Killed(Exception):
    pass


class Counter(CompletionCallback):
    """The completions that were run; after `limit` of them comes the end."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.ran: list[tuple[int, int]] = []
        self.tokens = 0

    def on_new_token(self) -> None:
        self.tokens += 1

    def on_completion(self, row: dict[str, Any]) -> None:
        if len(self.ran) == self.limit:
            raise Killed
        self.ran.append((row["index"], row.get("sample", 0)))


def random_module() -> GPTLightningModule:
    seed_everything(0, verbose=False)
    sizes: dict[str, Any] = {"n_layers": 1, "n_heads": 2, "d_model": 16}
    module = GPTLightningModule(GPTConfig(vocab_size=257, max_position_embeddings=64, **sizes))
    with torch.no_grad():
        module.model.token_embedding.weight.mul_(30)  # else all tokens are about equally likely
        module.model.token_embedding.weight[128:256] = 0  # bytes that are no character on their own
    return module


def alphabet_module() -> GPTLightningModule:
    """Its likeliest token is always the next byte: the head knows each token by the one before it."""
    sizes: dict[str, Any] = {"n_layers": 1, "n_heads": 1, "d_model": 64, "tie_embeddings": False}
    module = GPTLightningModule(GPTConfig(vocab_size=257, max_position_embeddings=32, **sizes))
    model = module.model
    with torch.no_grad():
        for parameter in [*model.blocks.parameters(), *model.position_embedding.parameters()]:
            parameter.zero_()
        table = torch.randn(257, 64, generator=torch.Generator().manual_seed(0))
        model.token_embedding.weight.copy_(table)
        model.lm_head.weight.copy_(torch.nn.functional.layer_norm(table, [64]).roll(1, dims=0))
    return module


def predict(
    module: GPTLightningModule,
    output: Path,
    settings: GenerationConfig,
    *callbacks: Any,
    prompts: list[str] = PROMPTS,
    batch_size: int = 2,
    checkpoint: str | None = "checkpoint",
    **data_options: Any,
) -> list[dict[str, Any]]:
    """The rows of the file; any text stands for a checkpoint's digest."""
    module.generation = settings
    kept: Any = checkpoint and SimpleNamespace(digest=checkpoint)
    with output.with_name("texts").open("w", encoding="utf-8") as stream:
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=any(isinstance(callback, StepProgressBar) for callback in callbacks),
            callbacks=[PredictionWriter(output, stream, kept), *callbacks],
        )
        data_options |= {"tokenizer": "bytes", "prompts": prompts, "batch_size": batch_size}
        data = TextDataModule(**data_options)
        trainer.predict(module, datamodule=data, return_predictions=False)
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_rows_that_end_are_replaced_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts that need 6, 1, 1, 1, 1 and 2 tokens take six steps of two rows; batches of two took nine."""
    steps = []
    choose = engine.Sampler.choose
    monkeypatch.setattr(engine.Sampler, "choose", lambda *args: (steps.append(1), choose(*args))[1])
    settings = GenerationConfig(max_new_tokens=20, do_sample=False, stop=["z"])
    prompts = ["t", "ay", "y", "by", "abcy", "x"]
    bar, counter = StepProgressBar(), Counter()
    rows = predict(alphabet_module(), tmp_path / "p.jsonl", settings, bar, counter, prompts=prompts)
    assert len(steps) == 6
    assert [row["completion"] for row in rows] == ["uvwxy", "", "", "", "", "y"]
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert [row["completion_tokens"] for row in rows] == [6, 1, 1, 1, 1, 2] and counter.tokens == 12
    assert "generated 12 tokens of 6 completions in " in capsys.readouterr().err
    assert (tmp_path / "texts").read_text() == "tuvwxy\n\nay\n\ny\n\nby\n\nabcy\n\nxy\n"


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_file_is_the_same_at_any_batch_size(batch_size: int, tmp_path: Path) -> None:
    module = random_module()
    one = predict(module, tmp_path / "one.jsonl", SAMPLED, checkpoint=None)
    many = predict(module, tmp_path / "many.jsonl", SAMPLED, batch_size=batch_size)
    assert one == many and [row["prompt"] for row in many] == PROMPTS
    assert len({row["completion"] for row in many}) == len(PROMPTS)


@pytest.mark.parametrize("num_samples, limits", [(1, (2, 3)), (3, (5, 9))])
def test_a_run_goes_on_where_another_ended(
    num_samples: int, limits: tuple[int, int], tmp_path: Path
) -> None:
    settings = GenerationConfig(max_new_tokens=12, num_samples=num_samples, logprobs=num_samples > 1)
    module = random_module()
    whole, output = tmp_path / "whole.jsonl", tmp_path / "p.jsonl"
    predict(module, whole, settings)
    ran: list[tuple[int, int]] = []
    for limit in limits:
        killed = Counter(limit)
        with pytest.raises(Killed):
            predict(module, output, settings, killed, batch_size=limit)
        assert any(name.startswith(".p.jsonl.part-") for name in names(tmp_path)) and not output.exists()
        ran += killed.ran
    last = Counter()
    predict(module, output, settings, last)
    assert output.read_bytes() == whole.read_bytes()
    assert names(tmp_path) == {"whole.jsonl", "p.jsonl", "texts"}
    ran += last.ran
    if num_samples == 1:
        # The writer, which stands first, had also kept the completion at which the end came.
        assert len(ran) == len(set(ran)) == len(PROMPTS) - 2
    else:
        assert len({index for index, _ in last.ran}) < len(PROMPTS)


def test_nothing_is_run_where_all_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module, output = random_module(), tmp_path / "p.jsonl"
    with monkeypatch.context() as broken, pytest.raises(Killed):
        broken.setattr(PredictionWriter, "_write", lambda *args: (_ for _ in ()).throw(Killed))
        predict(module, output, SAMPLED)
    assert not output.exists()
    again = Counter()
    with caplog.at_level("INFO", "gpt_lightning"):
        predict(module, output, SAMPLED, again)
    assert again.ran == [] and "resuming: 8 of 8 completions were finished" in caplog.text
    predict(module, tmp_path / "whole.jsonl", SAMPLED)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    predict(module, output, SAMPLED, again)  # what is complete is made anew
    assert len(again.ran) == len(PROMPTS)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"settings": GenerationConfig(max_new_tokens=12, seed=43)}, "generation.seed was 42, is 43"),
        ({"prompts": [*PROMPTS, "more"]}, "other prompts"),
        ({"checkpoint": "another"}, "other checkpoint"),
        ({"parse_special_tokens": True}, "data.parse_special_tokens was False, is True"),
    ],
)
def test_what_depends_on_something_else_is_not_taken(
    change: dict[str, Any], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, output = random_module(), tmp_path / "p.jsonl"
    former: dict[str, Any] = {"settings": GenerationConfig(max_new_tokens=12)}
    with pytest.raises(Killed):
        settings = former["settings"]
        predict(module, output, settings, Counter(4))
    caplog.clear()
    now = {**former, **change}
    settings = now.pop("settings")
    counter = Counter()
    with caplog.at_level("INFO", "gpt_lightning"):
        rows = predict(module, output, settings, counter, **now)
    assert len(counter.ran) == len(rows) == len(now.get("prompts", PROMPTS))
    (line,) = [record.message for record in caplog.records if record.name == "gpt_lightning"]
    assert line == f"beginning anew, not with what an earlier run had finished: {reason}"


def test_samples_and_log_probabilities(tmp_path: Path) -> None:
    module = random_module()
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 20}
    plain = predict(module, tmp_path / "one.jsonl", GenerationConfig(**settings))
    more = GenerationConfig(**settings, num_samples=3, logprobs=True)
    rows = predict(module, tmp_path / "three.jsonl", more, prompts=PROMPTS)
    assert [(row["prompt"], row["sample"]) for row in rows] == [(p, n) for p in PROMPTS for n in range(3)]
    first = [{key: row[key] for key in plain[0]} for row in rows if row["sample"] == 0]
    assert first == plain
    assert len({row["completion"] for row in rows}) > 2 * len(PROMPTS)
    tokenizer = TextDataModule(tokenizer="bytes").text_tokenizer
    for row in rows:
        assert len(row["logprobs"]) == row["completion_tokens"]
        prompt = tokenizer.encode(row["prompt"]) or [tokenizer.eos_token_id]
        completion = tokenizer.encode(row["completion"])
        assert len(completion) == row["completion_tokens"]
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            expected = module.model(ids).logits[0].log_softmax(dim=-1)
        places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        torch.testing.assert_close(
            torch.tensor(row["logprobs"]), expected[places, ids[0, len(prompt) :]], atol=1e-5, rtol=0
        )


class Leaving(io.StringIO):
    """A reader that has left, as `head` does."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_leaves_changes_nothing(tmp_path: Path) -> None:
    module, output = random_module(), tmp_path / "p.jsonl"
    rows = predict(module, output, SAMPLED)
    with_leaving = PredictionWriter(tmp_path / "q.jsonl", Leaving())
    predict(module, output, SAMPLED, with_leaving)
    assert (tmp_path / "q.jsonl").read_bytes() == output.read_bytes()
    assert len(rows) == len(PROMPTS)
