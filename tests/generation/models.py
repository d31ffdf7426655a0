"""Small models of random weights, prompts for them, and what transformers makes of both."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from gpt_lightning.generation.engine import Engine
from gpt_lightning.generation.prefill import visible_start
from gpt_lightning.generation.rows import Completion, Request, _uniforms
from gpt_lightning.generation.sampling import GenerationConfig, Sampler
from gpt_lightning.huggingface.gpt2 import config_to_gpt2, to_gpt2_state_dict
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel


def make_model(seed: int = 0, **changes: Any) -> GPTModel:
    """Odd sizes and weights large enough that every token, position and bias matters."""
    # A tied model of random weights repeats its last token.
    sizes = dict(vocab_size=101, max_position_embeddings=64, n_layers=2, n_heads=3, d_model=36)
    config = GPTConfig(**{**sizes, "dropout": 0.0, "tie_embeddings": False, **changes})
    model = GPTModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


class Counting(GPTModel):
    """A model that counts its passes, and the tokens of each."""

    def __init__(self, model: GPTModel) -> None:
        super().__init__(model.config)
        self.load_state_dict(model.state_dict())
        self.shapes: list[tuple[int, ...]] = []

    def hidden_states(self, input_ids: Tensor, **options: Any) -> Tensor:
        self.shapes.append(tuple(input_ids.shape))
        return super().hidden_states(input_ids, **options)


def make_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(101, (length,), generator=generator).tolist() for length in lengths]


def run_until(
    stop: Callable[[list[int]], bool],
    model: GPTModel,
    prompts: list[list[int]],
    settings: GenerationConfig,
    *,
    eos_token_id: int | None = None,
    numbers: list[int] | None = None,
    **options: Any,
) -> list[Completion]:
    """The completions, each ended where `stop` says so of its new tokens."""

    def ends_with(new_tokens: list[int]) -> Callable[[int], bool]:
        return lambda token: new_tokens.append(token) or stop(new_tokens)  # type: ignore[func-returns-value]

    numbers = list(range(len(prompts))) if numbers is None else numbers
    engine = Engine(model, settings, eos_token_id=eos_token_id, **options)
    return engine.complete(
        [
            Request(prompt, number, sample, ends_with([]))
            for number, prompt in zip(numbers, prompts, strict=True)
            for sample in range(settings.num_samples)
        ]
    )


def run_numbered(
    numbers: list[int], model: GPTModel, prompts: list[list[int]], settings: GenerationConfig, **options: Any
) -> list[Completion]:
    """The completions of prompts with numbers of their own."""
    return run_until(lambda new: False, model, prompts, settings, numbers=numbers, **options)


@torch.no_grad()
def recomputed(
    model: GPTModel, prompts: list[list[int]], settings: GenerationConfig, *, eos_token_id: int | None = None
) -> list[Completion]:
    """The completions, one after the other, each token from a pass over all that it sees."""
    completions, sampler, context = [], Sampler(settings), model.config.max_position_embeddings
    for number, sample in product(range(len(prompts)), range(settings.num_samples)):
        new: list[int] = []
        uniforms = _uniforms(settings, number, sample)
        while len(new) < settings.max_new_tokens and (not new or new[-1] != eos_token_id):
            text = prompts[number] + new
            seen = text[visible_start(len(text), context, settings.context_stride) :]
            logits = model.eval()(torch.tensor([seen])).logits[:, -1].float()
            new.append(int(sampler.choose(logits, [text], [len(prompts[number])], [next(uniforms)])[0, 0]))
        ends = new[-1] == eos_token_id
        completions.append(Completion(new[:-1] if ends else new, "eos" if ends else "length"))
    return completions


def transformers_model(model: GPTModel) -> GPT2LMHeadModel:
    """The same network, of transformers; no token of its ends a text."""
    config = GPT2Config(**config_to_gpt2(model.config), bos_token_id=None, eos_token_id=None)
    reference = GPT2LMHeadModel(config).eval()
    reference.load_state_dict(to_gpt2_state_dict(model.state_dict(), model.config))
    return reference


def greedy_of_transformers(
    reference: GPT2LMHeadModel, prompt: list[int], n_new: int, **options: Any
) -> list[int]:
    """The prompt and its continuation."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    text = reference.generate(
        ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False, pad_token_id=0, **options
    )
    return text[0].tolist()
