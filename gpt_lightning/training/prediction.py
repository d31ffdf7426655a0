"""Tells callbacks of the completions of `predict`, while they grow and when they have ended."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.prompts import PromptBatch
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.engine import Engine
from gpt_lightning.generation.rows import Completion, Request
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.generation.text_stream import TextStream
from gpt_lightning.kernels.choose import choose
from gpt_lightning.kernels.packed_linear import decoding_shapes, packed
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy


class CompletionCallback(Callback):
    """Follows `predict` from within: all prompts of a rank are one batch.

    `predict_step` tells it; tensor-parallel peers, which generate together, are all told the same.
    """

    def on_new_token(self) -> None:
        """Called at each new token of any completion, the eos not counted."""

    def on_completion(self, row: dict[str, Any]) -> None:
        """Called when a completion has ended; `row` is as `predict_step` returns it."""


def whole_model(trainer: Trainer | None) -> AbstractContextManager[None]:
    """Lets ranks call the model as often as each likes, also where replicas share out its parameters."""
    strategy = trainer.strategy if trainer is not None else None
    return strategy.gathered() if isinstance(strategy, TensorParallelDDPStrategy) else nullcontext()


def changed_settings(settings: GenerationConfig, changes: Mapping[str, Any]) -> GenerationConfig:
    known = [field.name for field in fields(GenerationConfig)]
    for name in changes.keys() - known:
        raise UserError(f"generation.{name} is no setting; choose one of {', '.join(known)}")
    return replace(settings, **changes)


def make_engine(
    trainer: Trainer | None,
    model: GPTModel,
    settings: GenerationConfig,
    tokenizer: TextTokenizer,
    n_rows: int,
) -> Engine:
    """Has tensor-parallel peers take the first one's tokens: with different ones they would deadlock."""
    strategy = trainer.strategy if trainer is not None else None
    broadcast = strategy.mesh.from_first_peer if isinstance(strategy, TensorParallelDDPStrategy) else None
    eos = tokenizer.eos_token_ids
    return Engine(model, settings, eos_token_id=eos, batch_size=n_rows, broadcast=broadcast)


def continued(
    engine: Engine, tokenizer: TextTokenizer, prompts: list[list[int]], settings: GenerationConfig
) -> list[str]:
    """Returns one continuation of each tokenized prompt."""
    texts = [TextStream(tokenizer, settings.stop) for _ in prompts]
    with torch.compiler.set_stance("force_eager"):  # lengths change with every token: each would be compiled
        engine.complete([Request(prompt, n, ends_with=texts[n].add) for n, prompt in enumerate(prompts)])
    return [text.end() for text in texts]


def agree_on_kernel(trainer: Trainer, model: GPTModel, settings: GenerationConfig) -> str | None:
    """Has all ranks multiply by the first one's kernel, since others may round otherwise."""
    datamodule = trainer.datamodule
    if not isinstance(datamodule, TextDataModule):
        return None
    n_rows = _n_rows(datamodule, settings)
    with trainer.precision_plugin.predict_step_context():
        shapes = decoding_shapes(model, quantize=settings.quantize, n_rows=n_rows)
    chosen = choose(shapes) if shapes and trainer.is_global_zero else None
    return trainer.strategy.broadcast(chosen)


def _n_rows(datamodule: TextDataModule, settings: GenerationConfig) -> int:
    return max(1, min(datamodule.batch_size, len(datamodule.all_prompts) * settings.num_samples))


def predict(
    trainer: Trainer,
    model: GPTModel,
    batch: PromptBatch,
    settings: GenerationConfig,
    kernel: str | None,
) -> list[dict[str, Any]]:
    """Continues a rank's prompts, and tells the CompletionCallbacks when one ends."""
    datamodule = trainer.datamodule
    if not isinstance(datamodule, TextDataModule):
        raise UserError("predict needs a tokenizer; give datamodule=TextDataModule(...), not a loader")
    tokenizer = datamodule.text_tokenizer
    listeners = [each for each in trainer.callbacks if isinstance(each, CompletionCallback)]
    n_rows = _n_rows(datamodule, settings)
    model = packed(model, quantize=settings.quantize, n_rows=n_rows, kernel=kernel)
    engine = make_engine(trainer, model, settings, tokenizer, datamodule.batch_size)
    # Lengths change with every token, and each would be compiled anew.
    with torch.compiler.set_stance("force_eager"):
        return _rows(engine, batch, settings, tokenizer, listeners)


def _rows(
    engine: Engine,
    batch: PromptBatch,
    settings: GenerationConfig,
    tokenizer: TextTokenizer,
    listeners: list[CompletionCallback],
) -> list[dict[str, Any]]:
    """Returns a dictionary for each completion, in the order of the prompts and their samples."""
    texts: dict[Request, TextStream] = {}
    prompts = dict(zip(batch.indices, batch.prompts))
    for index, token_ids in zip(batch.indices, batch.token_ids):
        for sample in range(settings.num_samples):
            text = TextStream(tokenizer, settings.stop)
            request = Request(token_ids, index, sample, ends_with=text.add)
            texts[request] = text
            engine.add(request)
    rows = []
    for step in engine.run():
        if step.token_id is not None:
            for listener in listeners:
                listener.on_new_token()
        if step.completion is not None:
            request, whole = step.request, texts.pop(step.request).end()
            rows.append(_row(request, prompts[request.number], whole, step.completion, settings.num_samples))
            for listener in listeners:
                listener.on_completion(rows[-1])
    return sorted(rows, key=lambda row: (row["index"], row.get("sample", 0)))


def _row(request: Request, prompt: str, text: str, completion: Completion, n_samples: int) -> dict[str, Any]:
    """Makes the dictionary of a completion; `index`, its place among the prompts, is not written out."""
    row: dict[str, Any] = {
        "index": request.number,
        "prompt": prompt,
        "completion": text,
        "prompt_tokens": len(request.prompt),
        "completion_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
    if n_samples > 1:
        row["sample"] = request.sample
    if completion.logprobs is not None:
        row["logprobs"] = [round(logprob, 6) for logprob in completion.logprobs]
    if completion.top_logprobs is not None:
        pairs = completion.top_logprobs
        row["top_logprobs"] = [[(token, round(logprob, 6)) for token, logprob in each] for each in pairs]
    return row
