"""Notes for the report what no curve says: with what, of what text and where a run is trained."""

import os
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

import gpt_lightning
from gpt_lightning.callbacks.text_samples import TextSamples
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.token_cache import TokenSplit
from gpt_lightning.generation.surprise import score_tokens
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.meta import Uninitialized
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.notes import FACTS, HELD_OUT, note, part_of
from gpt_lightning.training.prediction import whole_model
from gpt_lightning.training.scored_text import as_plain, shown_tokens

PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "numpy")
OF_A_START = ("config", "ckpt_path", "weights_only")  # no options of what is trained
HELD_OUT_TOKENS = 256  # are shown at most
_WHOLE_ENOUGH = 128  # tokens, for a document to be shown


class RunFacts(Callback):
    """Notes the facts at the start, and how the model finds some held-out text at the end.

    `words` are the command line, `config` what the parser has made of it.
    """

    def __init__(self, words: Sequence[str], parser: ArgumentParser, config: Namespace) -> None:
        self._words, self._parser, self._config = [*words], parser, config

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GPTLightningModule)
        if not trainer.is_global_zero:
            return
        facts: dict[str, Any] = {
            "command": self._words,
            "changed": self._changed(),
            "environment": environment(trainer, pl_module.device),
            "parameters": parameters_by_part(pl_module.model.config),
        }
        for callback in trainer.callbacks:
            if isinstance(callback, TextSamples):
                facts["prompts"] = callback.prompts
        if isinstance(data := trainer.datamodule, TextDataModule):
            facts["corpus"] = {name: _counts(split) for name, split in data.prepare().items()}
            facts["vocabulary"] = data.vocab_size
        note(trainer, FACTS, facts)

    def _changed(self) -> dict[str, Any]:
        found = yaml.safe_load(self._parser.dump(self._config, skip_default=True)) or {}
        return {name: value for name, value in found.items() if name not in OF_A_START}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GPTLightningModule)
        data = trainer.datamodule
        if not isinstance(data, TextDataModule) or (held_out := _held_out(data)) is None:
            return
        tokenizer = data.text_tokenizer
        room = min(HELD_OUT_TOKENS, data.seq_len - 1)
        token_ids = [tokenizer.eos_token_id, *_beginning(held_out, room)]
        # In eager mode, since a length of its own would be compiled; on every rank: they do it together.
        with torch.compiler.set_stance("force_eager"), whole_model(trainer):
            scored = score_tokens(pl_module.model, token_ids)
        if trainer.is_global_zero:
            note(trainer, HELD_OUT, as_plain(shown_tokens(scored[1:], tokenizer)))


def environment(trainer: Trainer, device: torch.device) -> dict[str, Any]:
    """Names the versions and the machine."""
    is_gpu = device.type == "cuda"
    return {
        "gpt_lightning": gpt_lightning.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if is_gpu else f"{device.type}, {os.cpu_count()} cores",
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """Names the commit of the folder that the program was started in, and whether more has changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def parameters_by_part(config: GPTConfig) -> dict[str, int]:
    """Counts the parameters of the whole model, of which a rank may hold a part."""
    with Uninitialized(), torch.device("meta"):
        model = GPTModel(config)
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts[part_of(name)] += parameter.numel()
    return dict(parts)


def _counts(split: TokenSplit) -> dict[str, Any]:
    return {
        "tokens": split.n_tokens,
        "bytes": split.n_bytes,
        "documents": split.n_documents,
        "longest": split.longest_document,
        "repeated": split.n_repeated,
    }


def _held_out(data: TextDataModule) -> TokenSplit | None:
    """Finds the validation text, or that of a mixture's first source that has any."""
    return next((split for name, split in data.prepare().items() if name.partition("/")[0] == "val"), None)


def _beginning(split: TokenSplit, n_tokens: int) -> list[int]:
    """Returns the first tokens of the first document that is not short, or else of the longest of some."""
    starts = split.document_starts[:1000].astype(np.int64)
    lengths = np.diff(starts)
    first = int(lengths.argmax() if lengths.max() < _WHOLE_ENOUGH else (lengths >= _WHOLE_ENOUGH).argmax())
    return split.opening(first, n_tokens)
