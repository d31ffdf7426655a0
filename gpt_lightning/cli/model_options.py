"""Opens the model that a verb without a Trainer is to run, on a device, by the options they share."""

from pathlib import Path
from typing import Any, Literal

import torch

from gpt_lightning.checkpoint.checkpoint import Checkpoint, load_model
from gpt_lightning.checkpoint.runs import checkpoints_folder, find_checkpoint
from gpt_lightning.cli.errors import say
from gpt_lightning.cli.model_class import import_class
from gpt_lightning.cli.parser import ALLOW_IMPORT, PlainParser
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.gpt import GPTModel

_Precision = Literal["float32", "bfloat16"]


def add_model_options(parser: PlainParser, *, several: bool = False) -> None:
    help = "The checkpoint; the newest one by default."
    parser.add_argument("--ckpt_path", type=str, help=help, action="append" if several else "store")
    parser.add_argument("--model", type=str, help="The class that saved it, if it is one of your own.")
    parser.add_argument(ALLOW_IMPORT, type=str, action="append", help="The package to import it from.")
    parser.add_argument("--default_root_dir", type=str, help="Where checkpoints/ is looked for.")
    parser.add_argument("--device", type=str, help="cpu, cuda, cuda:1 or mps; the fastest there by default.")
    parser.add_argument("--precision", type=_Precision, default="float32", help="Of weights and arithmetic.")


def choose_device(name: str | None) -> torch.device:
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    there = [kind for kind, count in counts.items() if count]
    if name is None:
        return torch.device(there[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name} is unknown; choose {', '.join(there)}") from None
    if (device.index or 0) >= counts.get(device.type, 0):
        raise UserError(f"device={name} is not there; choose {', '.join(there)}, or leave it out")
    return device


def open_model(options: Any, device: torch.device) -> tuple[Path, GPTModel, TextTokenizer]:
    path = find_checkpoint(options.ckpt_path, checkpoints_folder(options.default_root_dir), say)
    if options.model is None:
        model, tokenizer = load_model(path)
    else:
        module = import_class(options.model, options.allow_import or ()).load_from_checkpoint(path, "cpu")
        model, tokenizer = module.model.eval(), Checkpoint.open(path).tokenizer
    say(f"checkpoint: {path}")
    return path, model.to(device, getattr(torch, options.precision)), tokenizer
