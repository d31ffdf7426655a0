"""Runs the verbs that make one form of a model of another: `consolidate`, `import-hf` and the exports."""

from pathlib import Path

from gpt_lightning.checkpoint.atomic import naming
from gpt_lightning.checkpoint.checkpoint import consolidate
from gpt_lightning.checkpoint.files import write
from gpt_lightning.checkpoint.runs import named_checkpoint
from gpt_lightning.cli.errors import say
from gpt_lightning.cli.main import VERBS
from gpt_lightning.cli.parser import PlainParser, option_line
from gpt_lightning.exit_codes import UserError
from gpt_lightning.huggingface.exporting import export_model
from gpt_lightning.huggingface.gguf_file import DTYPES, export_gguf
from gpt_lightning.huggingface.importing import import_model


def run_consolidate(words: list[str]) -> None:
    parser = PlainParser(prog="gpt-lightning consolidate", description=VERBS["consolidate"])
    parser.add_argument("--ckpt_path", type=str, required=True, help="The folder that `save_sharded` wrote.")
    parser.add_argument("--output", type=str, required=True, help="The file to write.")
    options = parser.parse_args(words)
    with naming(f"output={options.output}"):
        consolidate(named_checkpoint(Path(options.ckpt_path), say), Path(options.output))
    say(f"checkpoint: {options.output}")


def run_import(words: list[str]) -> None:
    places = {
        "NAME_OR_FOLDER": "A folder with a config.json, or a name on the hub: gpt2, Qwen/Qwen3-0.6B, …",
        "OUT": "The checkpoint to write, such as gpt2.ckpt.",
    }
    name, output = _two_words("import-hf", words, places)
    if Path(output).exists():
        raise UserError(f"OUT={output} exists already; name another file, or remove it")
    contents = import_model(name, "NAME_OR_FOLDER")
    with naming(f"OUT={output}"):
        write(contents, Path(output))
    say(f"checkpoint: {output}")


def run_export(words: list[str]) -> None:
    places = {"CKPT": "A checkpoint, also a sharded one.", "FOLDER": "The folder to make."}
    checkpoint, folder = _two_words("export-hf", words, places)
    export_model(named_checkpoint(Path(checkpoint), say), Path(folder))
    say(f"model: {folder}")


def run_export_gguf(words: list[str]) -> None:
    parser = PlainParser(prog="gpt-lightning export-gguf", description=VERBS["export-gguf"])
    parser.add_argument("--ckpt_path", type=str, required=True, help="A checkpoint, also a sharded one.")
    parser.add_argument("--output", type=str, required=True, help="The file to write, such as my-gpt.gguf.")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="What matrices are stored in; all else is float32. q8_0: a byte a weight, and a scale of 32 of "
        "them; a matrix whose rows have no multiple of 32 weights is stored in float16.",
    )
    options = parser.parse_args(words)
    export_gguf(named_checkpoint(Path(options.ckpt_path), say), Path(options.output), options.dtype)
    say(f"model: {options.output}")


def _two_words(verb: str, words: list[str], places: dict[str, str]) -> tuple[str, str]:
    lines = [f"{VERBS[verb]}\n", *(option_line(name, help) for name, help in places.items())]
    parser = PlainParser(prog=f"gpt-lightning {verb}", description="\n".join(lines))
    parser.arguments = " ".join(places)
    for place in places:
        parser.add_argument(place.lower())
    options = parser.parse_args(words)
    first, second = (options[place.lower()] for place in places)
    return first, second
