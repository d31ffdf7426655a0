"""Refuses options of a TextDataModule that mean nothing, before any text is looked for."""

from typing import Any

from gpt_lightning.data.tokenizer import is_trained_here, requested_vocab_size
from gpt_lightning.exit_codes import UserError


def check_options(data: Any) -> None:
    if not 0 <= data.val_fraction < 1:
        option = f"data.val_fraction={data.val_fraction}"
        raise UserError(f"{option} is not in [0, 1); choose a fraction such as 0.1")
    for option, least in (("seq_len", 1), ("batch_size", 1), ("num_workers", 0), ("seed", 0)):
        if getattr(data, option) < least:
            raise UserError(f"data.{option}={getattr(data, option)} is below {least}; raise it")
    if data.mixture is None and data.mixture_used_up != "repeat":
        problem = f"data.mixture_used_up={data.mixture_used_up} goes with data.mixture alone"
        raise UserError(f"{problem}; leave it out, or end the run with trainer.max_epochs")
    if data.document_separator == "":
        raise UserError("data.document_separator='' separates nothing; leave it out or give some text")
    if is_trained_here(data.tokenizer):
        requested_vocab_size(data.tokenizer)
    for option in ("train_files", "val_files", "test_files") if data.mixture is not None else ():
        if getattr(data, option) is not None:
            files = "files" if option == "train_files" else option
            problem = f"data.{option} stands beside data.mixture, whose sources have {files} of their own"
            raise UserError(f"{problem}; leave out the one or the other")
