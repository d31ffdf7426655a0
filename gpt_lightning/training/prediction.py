"""Tells callbacks of the completions of `predict`, while they grow and when they have ended."""

from typing import Any

from lightning.pytorch import Callback

from gpt_lightning.data.prompts import PromptBatch
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.generation.engine import Completion, Engine, Request
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.generation.text_stream import TextStream


class CompletionCallback(Callback):
    """Follows `predict` from within: all prompts of a rank are one batch.

    `predict_step` tells it; tensor-parallel peers, which generate together, are all told the same.
    """

    def on_new_token(self) -> None:
        """Called at each new token of any completion, the eos not counted."""

    def on_completion(self, row: dict[str, Any]) -> None:
        """Called when a completion has ended; `row` is as `predict_step` returns it."""


def predicted_rows(
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
    for request, token_id, _, completion in engine.run():
        if token_id is not None:
            for listener in listeners:
                listener.on_new_token()
        if completion is not None:
            whole = texts.pop(request).end()
            rows.append(_row(request, prompts[request.number], whole, completion, settings.num_samples))
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
    return row
