"""`gpt-lightning import-hf` and `export-hf`: a Hugging Face folder into a checkpoint, and back."""

from pathlib import Path

from jsonargparse import ArgumentParser

from gpt_lightning.checkpoint_file import write
from gpt_lightning.cli_checks import say
from gpt_lightning.cli_verbs import VERBS
from gpt_lightning.huggingface_export import export_gpt2
from gpt_lightning.huggingface_import import import_gpt2


def run_import(words: list[str]) -> None:
    parser = ArgumentParser(prog="gpt-lightning import-hf", description=VERBS["import-hf"])
    parser.add_argument("name", metavar="NAME_OR_FOLDER", help="A folder, or a name on the hub such as gpt2.")
    parser.add_argument("output", metavar="OUT", help="The checkpoint to write, such as gpt2.ckpt.")
    options = parser.parse_args(words)
    output = Path(options.output)
    if output.exists():
        raise ValueError(f"OUT={output} exists already; name another file, or remove it")
    write(import_gpt2(options.name, "NAME_OR_FOLDER"), output)
    say(f"checkpoint: {output}")


def run_export(words: list[str]) -> None:
    parser = ArgumentParser(prog="gpt-lightning export-hf", description=VERBS["export-hf"])
    parser.add_argument("checkpoint", metavar="CKPT", help="A checkpoint, also a sharded one.")
    parser.add_argument("folder", metavar="FOLDER", help="The folder to make.")
    options = parser.parse_args(words)
    export_gpt2(Path(options.checkpoint), Path(options.folder))
    say(f"model: {options.folder}")
