"""Small random Llamas and Qwens: ours, transformers', and the folders that its `save_pretrained` writes."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Qwen2Tokenizer

from gpt_lightning.data.fast_bpe import byte_alphabet
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.huggingface.families import Family, family_of
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel

LLAMA: dict[str, Any] = {"positions": "rope", "norm": "rms", "activation": "swiglu", "bias": False}
QWEN2, QWEN3 = {**LLAMA, "bias": "qkv"}, {**LLAMA, "qk_norm": True}
V = 101


def make_model(**options: Any) -> GPTModel:
    """Odd sizes, and weights so large that each of them matters."""
    sizes = {"vocab_size": V, "max_position_embeddings": 48, "n_layers": 2, "n_heads": 3, "d_model": 36}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = GPTModel(GPTConfig(**{**sizes, **options}))
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


def reference_of(model: GPTModel) -> tuple[Family, Any]:
    family = family_of(model.config)
    config = getattr(transformers, family.config_class)(**family.config_to(model.config))
    reference = getattr(transformers, family.architecture)(config).eval()
    reference.load_state_dict(family.weights_to(model.state_dict(), model.config))
    return family, reference


def write_llama(folder: Path, tokenizer: TextTokenizer, **options: Any) -> None:
    model = make_model(**{"vocab_size": tokenizer.vocab_size, **options})
    reference = reference_of(model)[1]
    reference.config.update({"bos_token_id": None, "eos_token_id": None})  # Llama 2's
    reference.save_pretrained(folder)
    tokenizer.save(folder)


def qwen_tokenizer(n_ids: int) -> TextTokenizer:
    """One of Qwen's kind, which transformers takes every Qwen2's for: single bytes, and the end of text."""
    vocabulary = {character: index for index, character in enumerate(byte_alphabet()[: n_ids - 1])}
    tokenizer = Qwen2Tokenizer({**vocabulary, "<|endoftext|>": n_ids - 1}, [])
    return TextTokenizer(tokenizer.backend_tokenizer, "<|endoftext|>")
