"""Writes the README.md of an exported model: data, recipe and perplexity, as far as they are known."""

import math
from collections.abc import Mapping
from typing import Any

from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.checkpoint.contents import DATA_KEY, ORIGIN_KEY, VALIDATION_KEY
from gpt_lightning.huggingface.families import Family

# Options that are for one choice of another alone, and idle with others.
ONLY_WITH = {
    "rope_theta": ("positions", "rope"),
    "momentum": ("name", "muon"),
    "decay_fraction": ("shape", "wsd"),
}
HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- {model_type}
- text-generation
- gpt_lightning
---
"""
USE = """## Use

```python
from transformers import pipeline

print(pipeline("text-generation", model="{name}")("The")[0]["generated_text"])
```
"""


def model_card(checkpoint: Checkpoint, name: str, kind: Family) -> str:
    name = _in_a_line(name)
    head = "lm_head.weight" if checkpoint.config.tie_embeddings else None
    n_parameters = sum(weight.numel() for key, weight in checkpoint.weights.items() if key != head)
    architecture = f"A language model of {kind.name}'s architecture with {n_parameters:,} parameters"
    parts = (
        HEADER.format(model_type=kind.model_type),
        f"# {name}\n\n{architecture}, written by gpt_lightning's `export-hf`.\n",
        "## Data\n\n" + _as_list(_data(checkpoint)),
        "## Recipe\n\n" + _as_list(_recipe(checkpoint)),
        "## Final perplexity\n\n" + _result(checkpoint) + "\n",
        USE.format(name=name),
    )
    return "\n".join(parts)


def _data(checkpoint: Checkpoint) -> dict[str, str]:
    n_ids = checkpoint.tokenizer.vocab_size
    state = checkpoint.contents[DATA_KEY]
    settings = state["settings"]
    texts = [state.get("text"), *_mapping(_mapping(state.get("mixture")).get("texts")).values()]
    train, held_out = (
        ", ".join(filter(None, (_file_names(_mapping(text).get(name)) for text in texts)))
        for name in ("train_files", "val_files")
    )
    if not held_out and train and "val_fraction" in settings:
        held_out = f"{settings['val_fraction']} of it, held out before anything was cut into windows"
    return {
        "training text": train or "not known to the checkpoint",
        "validation text": held_out or "not known to the checkpoint",
        "tokenizer": f"{_code(settings.get('tokenizer', 'unnamed'))}, {n_ids:,} ids",
    }


def _recipe(checkpoint: Checkpoint) -> dict[str, str]:
    chosen = _mapping(checkpoint.contents.get("hyper_parameters"))
    origin = checkpoint.contents.get(ORIGIN_KEY)
    recipe = {
        "begun from": "random weights" if origin is None else f"the weights of {_code(origin)}",
        "architecture": _options(vars(checkpoint.config)),
    }
    if not checkpoint.step:
        return recipe | {"training": "none since"}
    steps = f"{checkpoint.step:,} optimizer step{'s' if checkpoint.step > 1 else ''}"
    return recipe | {
        "optimizer": _options(_mapping(chosen.get("optimizer"))),
        "learning rate over time": _options(_mapping(chosen.get("schedule"))),
        "training": f"{steps}{_tokens_seen(checkpoint)}",
    }


def _tokens_seen(checkpoint: Checkpoint) -> str:
    state = checkpoint.contents[DATA_KEY]
    windows, seq_len = state.get("consumed_samples"), state["settings"].get("seq_len")
    if type(windows) is not int or type(seq_len) is not int:
        return ""
    return f", {windows:,} windows of {seq_len:,} tokens ({windows * seq_len:,} tokens)"


def _result(checkpoint: Checkpoint) -> str:
    last = _mapping(checkpoint.contents.get(VALIDATION_KEY))
    loss, step = last.get("loss"), last.get("step")
    if type(loss) is not float or type(step) is not int:
        return "Not known: the checkpoint was saved before any validation."
    part = "every token" if last.get("whole") is True else "a part"
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return (
        f"Perplexity **{perplexity:,.2f}** (loss {loss:.4f} nats a token) over {part} of the validation "
        f"text, at step {step:,} of {checkpoint.step:,}.{_of_sources(last)}"
    )


def _of_sources(validation: Mapping[str, Any]) -> str:
    """Names the perplexity of each text of a mixture."""
    losses = _mapping(validation.get("sources")).items()
    found = [f"{_code(name)} {math.exp(min(loss, 700)):,.2f}" for name, loss in losses]
    return f" Of each text: {', '.join(found)}." if found else ""


# ---- text


def _as_list(entries: Mapping[str, str]) -> str:
    return "".join(f"- {name}: {text}\n" for name, text in entries.items() if text)


def _options(options: Mapping[str, Any]) -> str:
    idle = {name for name, (choice, value) in ONLY_WITH.items() if options.get(choice) != value}
    said = {name: value for name, value in options.items() if value is not None and name not in idle}
    return _in_a_line(", ".join(f"{name} {value}" for name, value in said.items()))


def _file_names(files: Any) -> str:
    pairs = files if isinstance(files, list) else []
    names = [_code(pair[0]) for pair in pairs if isinstance(pair, list) and pair]
    return ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")


def _code(value: Any) -> str:
    return f"`{_in_a_line(value).replace('`', '')}`"


def _in_a_line(value: Any) -> str:
    return " ".join(str(value).split())


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
