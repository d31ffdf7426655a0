"""A server of small models in a thread of the test's process."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gpt_lightning.data.tokenizer import TextTokenizer, train_bpe
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.server.app import make_app
from gpt_lightning.server.limits import Limits
from gpt_lightning.server.metrics import Metrics
from gpt_lightning.server.security import Access
from gpt_lightning.server.served import ServedModel, served_model
from gpt_lightning.server.serving import make_server, open_socket

TEXTS = ["从前有一个国王。👍🏽 naïve e\u0301 The cat sees the dog.\n"] * 4
DEFAULTS = GenerationConfig(max_new_tokens=16, temperature=0.0)


def small_tokenizer() -> TextTokenizer:
    return train_bpe(TEXTS, 330)


def small_model(tokenizer: TextTokenizer, seed: int = 0) -> GPTModel:
    """Has learnt nothing, and is sure of what it writes."""
    torch.manual_seed(seed)
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=32, n_layers=2, n_heads=2, d_model=16
    )
    model = GPTModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(12)
    return model


def small_served(
    name: str = "small",
    *,
    model: GPTModel | None = None,
    tokenizer: TextTokenizer | None = None,
    settings: GenerationConfig = DEFAULTS,
    limits: Limits = Limits(),
    metrics: Metrics | None = None,
    n_rows: int = 4,
    seed: int | None = None,
) -> ServedModel:
    tokenizer = tokenizer or small_tokenizer()
    model = model or small_model(tokenizer)
    options: dict[str, Any] = {"seed": seed, "n_rows": n_rows, "prefill_tokens": 8, "limits": limits}
    return served_model(name, model, tokenizer, settings, metrics=metrics or Metrics(), **options)


@contextmanager
def serving(
    models: Sequence[ServedModel],
    *,
    limits: Limits = Limits(),
    metrics: Metrics | None = None,
    access: Access | None = None,
) -> Iterator[str]:
    """Serves on a free port of the loopback, whose address is given."""
    access = access or Access(frozenset({"127.0.0.1", "localhost"}))
    opened = open_socket("127.0.0.1", 0)
    started = threading.Event()
    server = make_server(make_app(models, limits, metrics or Metrics(), access), limits, started.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([opened])))
    thread.start()
    assert started.wait(30)
    try:
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
