"""Runs `consolidate`, which makes one file of a sharded checkpoint."""

import sys
from pathlib import Path

from jsonargparse import ArgumentParser

from gpt_lightning.checkpoint.checkpoint import consolidate
from gpt_lightning.cli.verbs import VERBS


def run_consolidate(words: list[str]) -> None:
    parser = ArgumentParser(prog="gpt-lightning consolidate", description=VERBS["consolidate"])
    parser.add_argument("--ckpt_path", type=str, required=True, help="The folder that `save_sharded` wrote.")
    parser.add_argument("--output", type=str, required=True, help="The file to write.")
    options = parser.parse_args(words)
    consolidate(Path(options.ckpt_path), Path(options.output))
    print(f"checkpoint: {options.output}", file=sys.stderr)
