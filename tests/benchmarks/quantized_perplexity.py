"""What bfloat16 and int8 cost in perplexity: a trained model on the text that it was not trained on.

    python tests/benchmarks/quantized_perplexity.py checkpoints/luxun/last.ckpt --files luxun.jsonl

The files are those of the run, with its `--text_key` and so on at their defaults; what it held out is found
again by its seed. Each token is predicted once, by the copies of the model that generation uses.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch

from gpt_lightning.checkpoint.checkpoint import Checkpoint, load_model
from gpt_lightning.checkpoint.contents import DATA_KEY
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.kernels.packed_linear import packed
from gpt_lightning.model.gpt import GPTModel

BATCH = 8


def perplexity(model: GPTModel, datamodule: TextDataModule) -> float:
    nll, tokens = 0.0, 0
    with torch.inference_mode():
        for batch in datamodule.val_dataloader():
            logits = model.lm_head(model.hidden_states(batch.input_ids)).float()
            scored = batch.targets != -100
            of_targets = logits.log_softmax(dim=-1)[scored].gather(1, batch.targets[scored][:, None])
            nll -= of_targets.double().sum().item()
            tokens += int(scored.sum())
    return math.exp(nll / tokens)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--files", nargs="+", required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.checkpoint)
    settings = Checkpoint.open(options.checkpoint).contents[DATA_KEY]["settings"]
    with tempfile.TemporaryDirectory() as folder:
        datamodule = TextDataModule(
            train_files=options.files, batch_size=BATCH, cache_dir=folder, **settings
        )
        datamodule.use_tokenizer(tokenizer)
        found = {"float32": perplexity(model, datamodule)}
        half = GPTModel(model.config).to(torch.bfloat16)
        half.load_state_dict(model.state_dict())
        found["bfloat16"] = perplexity(packed(half, quantize=None, n_rows=BATCH), datamodule)
        found["int8"] = perplexity(packed(model, quantize="int8", n_rows=BATCH), datamodule)
        n_tokens = datamodule.split_counts("val")[0]
    for name, value in found.items():
        print(f"{name:9} perplexity {value:.3f}  {100 * (value / found['float32'] - 1):+.2f} %")
    print(json.dumps({"held_out_tokens": n_tokens, **{name: round(ppl, 4) for name, ppl in found.items()}}))


if __name__ == "__main__":
    main()
