"""A checkpoint of a model that recites: at each place it writes one token, whatever stands before."""

from dataclasses import asdict
from pathlib import Path

import lightning
import torch

from gpt_lightning.checkpoint.files import write
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel


def write_reciting(path: Path, text: str, tokenizer: TextTokenizer) -> None:
    """Writes one that goes through the text again and again: its place alone decides, and it never ends."""
    ids = 3 * tokenizer.encode(text)
    n = len(ids)
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=n, n_layers=1, n_heads=1, d_model=n, d_ff=1,
        positions="learned", norm="layer", activation="gelu_tanh", qk_norm=False, bias=True,
        tie_embeddings=False,
    )
    model = GPTModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.ln_f.weight.fill_(1.0)
        model.position_embedding.weight.copy_(torch.eye(n))  # each place has a channel of its own
        model.lm_head.weight[ids, torch.arange(n)] = 1.0
    write_checkpoint(path, model, tokenizer)


def write_checkpoint(path: Path, model: GPTModel, tokenizer: TextTokenizer) -> None:
    position = {"consumed_samples": 0, "batches": 0, "epoch_batches": 0}
    data = {**position, "tokenizer": tokenizer.state, "settings": {"tokenizer": "bpe"}, "text": {}}
    path.parent.mkdir(parents=True)
    contents = {"state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()}}
    contents |= {"gpt_config": asdict(model.config), "TextDataModule": data, "global_step": 0}
    write({**contents, "pytorch-lightning_version": lightning.__version__}, path)
