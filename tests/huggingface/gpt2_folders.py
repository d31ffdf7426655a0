"""Small random GPT-2s of transformers', as the folders that its `save_pretrained` writes."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel

from gpt_lightning.data.tokenizer import TextTokenizer, load_tokenizer

SIZES = {"n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_inner": 50}


def write_gpt2(
    folder: Path, tokenizer: TextTokenizer | None = None, *, scale: float = 0.3, **options: Any
) -> GPT2LMHeadModel:
    """Random in every weight and bias; a byte a token, unless there is a tokenizer."""
    tokenizer = tokenizer or load_tokenizer("bytes")
    model = GPT2LMHeadModel(GPT2Config(**{"vocab_size": tokenizer.vocab_size, **SIZES, **options}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return model.eval()


def word_tokenizer(n_ids: int) -> TextTokenizer:
    """Words w0, w1, ... and the end of text."""
    vocabulary = {f"w{index}": index for index in range(n_ids - 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TextTokenizer(tokenizer, "<|endoftext|>")
