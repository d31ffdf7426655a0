"""What `predict` tells of its completions, while they grow and when they have ended."""

from collections.abc import Callable
from typing import Any

from gpt_lightning.data.prompts import PromptBatch
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.generation.interface import Completion
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.generation.text_stream import cut_at_stop, stop_test
from gpt_lightning.training.completion_callback import CompletionCallback


def after_token(
    tokenizer: TextTokenizer, stop: list[str], listeners: list[CompletionCallback]
) -> Callable[[list[int]], bool]:
    """Tells of a new token, and whether the text so far holds a stop string, maybe within tokens."""
    has_stopped = stop_test(tokenizer, stop)

    def tell(token_ids: list[int]) -> bool:
        for listener in listeners:
            listener.on_new_token()
        return has_stopped(token_ids)

    return tell


def prediction_row(
    batch: PromptBatch,
    place: int,
    sample: int,
    completion: Completion,
    tokenizer: TextTokenizer,
    settings: GenerationConfig,
) -> dict[str, Any]:
    """What is written of a completion, after the number of its prompt."""
    whole = tokenizer.decode(completion.token_ids)
    text = cut_at_stop(whole, settings.stop)
    row: dict[str, Any] = {
        "index": batch.indices[place],
        "prompt": batch.prompts[place],
        "completion": text,
        "prompt_tokens": len(batch.token_ids[place]),
        "completion_tokens": len(completion.token_ids),
        # Where tokens without text lie within a stop string, its end may have been overlooked.
        "finish_reason": completion.finish_reason if text == whole else "stop",
    }
    if settings.num_samples > 1:
        row["sample"] = sample
    if completion.logprobs is not None:
        row["logprobs"] = [round(logprob, 6) for logprob in completion.logprobs]
    return row
