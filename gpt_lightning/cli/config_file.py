"""Finds the configuration file that a verb runs with, before Lightning sees the command line."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from gpt_lightning.callbacks.run_config import CONFIG_NAME
from gpt_lightning.checkpoint.runs import checkpoints_folder, find_checkpoint, newest_checkpoint, step_of
from gpt_lightning.cli.errors import say
from gpt_lightning.exit_codes import UserError

QUICKSTART, FINE_TUNING = "quickstart.yaml", "finetune_gpt2.yaml"
PROMPTS = "--data.prompts"


def complete_words(words: list[str]) -> list[str]:
    """Fills in the configuration file that the command line leaves to us.

    `fit` and `prepare` alone run the quickstart, from given weights the fine-tuning; `fit`, `validate` and
    `test` of a checkpoint run with the configuration that was saved beside it. `predict` needs none.
    """
    words = [_verbatim(before, word) for before, word in zip(["", *words], words)]
    values = _values(words)
    names = ("--init_from", "--ckpt_path", "--trainer.default_root_dir")
    init_from, given, root = (values.get(name, [None])[-1] for name in names)
    if init_from is not None and words[0] not in ("fit", "prepare"):
        raise UserError(f"init_from={init_from} begins a fit; for {words[0]} give --ckpt_path FILE")
    if init_from is not None and given not in (None, "last", "null"):
        raise UserError(
            f"init_from={init_from} begins a run, and ckpt_path={given} goes on with one; leave one out"
        )
    if files := [*values.get("--config", []), *values.get("-c", [])]:
        for file in files:
            _check_config_file(Path(file))
        return words
    verb, *rest = words
    folder = checkpoints_folder(root)
    resumes = verb == "fit" and given is not None and (given != "last" or newest_checkpoint(folder))
    if init_from is not None or verb in ("fit", "prepare") and not resumes:
        recipe = QUICKSTART if init_from is None else FINE_TUNING
        return [verb, "--config", _shipped_config(recipe), *rest]
    if verb == "predict" or {"-h", "--help", "--help-all"} & {*rest}:
        return words
    path = find_checkpoint(given, folder, say)
    if not path.exists():
        return words
    config = str(path.parent / CONFIG_NAME)
    if not Path(config).is_file():
        if verb != "fit" or step_of(path) != 0:
            raise UserError(f"ckpt_path={path} has no {CONFIG_NAME} beside it; give --config FILE")
        config = _shipped_config(FINE_TUNING)  # the checkpoint is an imported one
    # The path again: the configuration may name another folder to look for checkpoints in.
    return [verb, "--config", config, *rest, "--ckpt_path", str(path)]


def _verbatim(before: str, word: str) -> str:
    """Keeps a prompt that is no list a text, even one that YAML would read as null, a number or a comment."""
    start = PROMPTS + "=" if word.startswith(PROMPTS + "=") else ""
    if not start and before != PROMPTS:
        return word
    given = word.removeprefix(start)
    # YAML takes the two surrogates by which JSON writes an emoji in ASCII for two characters, or for none.
    for load in (yaml.safe_load, json.loads):
        with suppress(yaml.YAMLError, ValueError):
            prompts = load(given)
            if isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts):
                "".join(prompts).encode()
                return word if load is yaml.safe_load else start + json.dumps(prompts, ensure_ascii=False)
    return start + json.dumps([given], ensure_ascii=False)


def _check_config_file(path: Path) -> None:
    """Refuses what YAML readers let pass or report without the file's name."""
    if not path.is_file():
        raise UserError(f"--config {path} is not a file; check the path, seen from {Path.cwd()}")
    try:
        yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path} is not UTF-8 at byte {error.start}; convert it") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"--config {path}{line}: {error.problem}; mend the file") from error


class _StrictLoader(yaml.SafeLoader):
    """Reads YAML in which a key may stand once; the usual reader lets the last one win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"the key {key.value} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _values(words: list[str]) -> dict[str, list[str]]:
    """Collects the values of every option on the command line, as `--name value` or `--name=value`."""
    values: dict[str, list[str]] = {}
    for word, following in zip(words, [*words[1:], ""]):
        name, equals, value = word.partition("=")
        if name.startswith("-"):
            values.setdefault(name, []).append(value if equals else following)
    return values


def _shipped_config(name: str) -> str:
    """Finds it inside the package where that is installed, beside it in a clone."""
    package = Path(__file__).parent.parent
    candidates = (package / "configs" / name, package.parent / "configs" / name)
    return str(next(path for path in candidates if path.is_file()))
