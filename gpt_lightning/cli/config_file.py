"""Finds the configuration files that a verb runs with, before Lightning sees the command line."""

import json
import re
import shlex
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from gpt_lightning.callbacks.run_config import CONFIG_NAME
from gpt_lightning.checkpoint.runs import (
    checkpoints_folder,
    find_checkpoint,
    newest_checkpoint,
    newest_of_run,
    run_folder,
    step_of,
)
from gpt_lightning.cli.errors import say
from gpt_lightning.cli.recipes import FINE_TUNING, QUICKSTART, config_file, recipe, recipe_beneath
from gpt_lightning.cli.short_names import in_full
from gpt_lightning.cli.yaml_text import (
    UnboundedError,
    check_bounded,
    line_of,
    load_yaml,
    place_and_problem,
    without_colon,
)
from gpt_lightning.data.charset import not_utf8
from gpt_lightning.data.documents import has_half_character
from gpt_lightning.data.prompts import decoded_again
from gpt_lightning.data.sources import SUFFIXES
from gpt_lightning.exit_codes import UserError

PROMPTS = "--data.prompts"
TEXTS = (PROMPTS, "--samples.prompts", "--generation.stop", "--data.document_separator", "--data.text_key")
CONFIG = ("--config", "-c")
ROOT, OWN_FOLDER = "--trainer.default_root_dir", "--checkpoint.dirpath"
GROUPS = ("trainer", "model", "data", "generation", "checkpoint", "non_finite", "samples")
YAML = (".yaml", ".yml", ".json")
OF_MODEL = ("config", "optimizer", "schedule", "init_args")
YAML_NULL = ("null", "Null", "NULL", "~")


def complete_words(words: list[str]) -> tuple[list[str], Path | None]:
    """Fills in the files that the command line leaves to us; returns the words, and the recipe beneath them.

    The recipe holds all that is said nowhere: the quickstart's, or the fine-tuning's where a run begins with
    given weights. `fit`, `validate` and `test` of a checkpoint run with the configuration that was saved with
    it, which says everything.
    """
    words = _readable(words)
    verb, values = words[0], _values(words)
    names = ("--init_from", "--ckpt_path", "--run_name")
    init_from, given, name = (_value(values, option) for option in names)
    if init_from is not None and verb not in ("fit", "prepare"):
        raise UserError(f"init_from={init_from} begins a fit; for {verb} give --ckpt_path FILE")
    if init_from is not None and given not in (None, "last"):
        raise UserError(
            f"init_from={init_from} begins a run, and ckpt_path={given} goes on with one; leave one out"
        )
    contents = [_read_config(Path(file)) for option in CONFIG for file in values.get(option, [])]
    is_evaluation, is_help = verb not in ("fit", "prepare"), bool({"-h", "--help", "--help-all"} & {*words})
    if is_evaluation and name is not None and given in (None, "last") and not is_help:
        given = str(_newest_of_named(checkpoints_folder(_value(values, ROOT)), name))
        words += ["--ckpt_path", given]
    needs_no_other = verb in ("predict", "prepare") or is_evaluation and is_help
    begins = init_from is not None or verb == "fit" and (given is None or is_help)
    if contents or needs_no_other or begins:
        is_fine_tuning = init_from is not None if "--init_from" in values else None
        return words, recipe_beneath(contents, is_fine_tuning=is_fine_tuning)
    return _with_saved_config(words, values, given)


def _readable(words: list[str]) -> list[str]:
    """Returns the words as jsonargparse is to have them; refuses what it would not come to an end with."""
    if words[0] == "predict":
        renamed = [PROMPTS + word.removeprefix("--prompt") if _is_prompt(word) else word for word in words]
        words = in_full(renamed)
    words = [_verbatim(before, _in_utf8(before, word)) for before, word in zip(["", *words], words)]
    words = _files_first(_with_recipes(words))
    if words[0] == "fit":
        _refuse_other_than_utf8(words)
    for option, given_values in _values(words).items():
        for value in given_values if option == "--data" else ():
            if value.endswith(SUFFIXES) or Path(value).is_dir():
                problem = f"--data {value} is a text, and --data takes a file of options"
                raise UserError(f"{problem}; write --data.train_files {shlex.quote(value)}")
        for value in given_values if option != PROMPTS else ():  # a text of any form
            _refuse_unbounded(option.removeprefix("--"), value)
    return words


def _is_prompt(word: str) -> bool:
    """Tells the option by which `generate` takes its one prompt."""
    return word.partition("=")[0] == "--prompt"


def _with_recipes(words: list[str]) -> list[str]:
    """Puts the files of recipes in the place of their names."""
    found = []
    for before, word in zip(["", *words], words):
        option, equals, value = word.partition("=")
        if before in CONFIG:
            word = str(config_file(word))
        elif option in CONFIG and equals:
            word = f"{option}={config_file(value)}"
        found.append(word)
    return found


def _files_first(words: list[str]) -> list[str]:
    """Puts files of options before all others, which hold over them: for jsonargparse the later one holds."""
    whole: list[str] = []
    of_groups: list[str] = []
    others, left = [words[0]], deque(words[1:])
    while left:
        word = left.popleft()
        option, equals, value = word.partition("=")
        pair = [word] if equals or not left else [word, left[0]]
        if option in CONFIG:
            taken = whole
        elif option.removeprefix("--") in GROUPS and (value if equals else pair[-1]).endswith(YAML):
            taken = of_groups
        else:
            others.append(word)
            continue
        taken += pair
        if len(pair) > 1:
            left.popleft()
    return [others[0], *whole, *of_groups, *others[1:]]


def _newest_of_named(folder: Path, name: str) -> Path:
    if (newest := newest_of_run(run_folder(folder, name), say)) is None:
        remedy = "name another, or give --ckpt_path FILE"
        raise UserError(f"run_name={name} has no checkpoint in {folder}; {remedy}")
    return newest


def _with_saved_config(
    words: list[str], values: dict[str, list[str]], given: str | None
) -> tuple[list[str], Path | None]:
    """Adds the configuration that was saved with the checkpoint that is meant.

    The `last` of a fit is of the run that the words name, by its name or by its own folder; one that has none
    yet begins, as it was begun if it was. Only where neither is named, it is of any run.
    """
    is_fit, root = words[0] == "fit", _value(values, ROOT)
    folder, name, own = checkpoints_folder(root), _value(values, "--run_name"), _value(values, OWN_FOLDER)
    if is_fit and given == "last":
        where = folder
        if own is not None:
            newest = newest_checkpoint(where := Path(own))
        elif name is not None:
            newest = newest_of_run(where := run_folder(folder, name))
        else:
            newest = newest_checkpoint(folder, say)
        path = newest or where / "last.ckpt"
        if newest is None and _config_of(path, folder) is None:
            return words, recipe(QUICKSTART)
    else:
        path = find_checkpoint(given, folder, say)
        if not path.exists():
            return words, recipe(QUICKSTART)  # the line that refuses it stands where it is opened
    if (config := _config_of(path, folder)) is None:
        if not is_fit or step_of(path) != 0:
            raise UserError(f"ckpt_path={path} has no {CONFIG_NAME} beside it; give --config FILE")
        return [*words, "--ckpt_path", str(path)], recipe(FINE_TUNING)  # the checkpoint is an imported one
    words = [words[0], "--config", config, *words[1:]]
    if is_fit and given == "last" and own is not None:
        return words, None
    if is_fit and given == "last" and name is not None:
        return [*words, ROOT, root or "."], None  # it may name another folder, from before a move
    return [*words, "--ckpt_path", str(path)], None


def _config_of(checkpoint: Path, folder: Path) -> str | None:
    """Finds the configuration beside a checkpoint, or else in the folder of the run that writes it there."""
    if (beside := checkpoint.parent / CONFIG_NAME).is_file():
        return str(beside)
    written_there = []
    for config in folder.glob(f"*/{CONFIG_NAME}"):
        with suppress(yaml.YAMLError, OSError, UnicodeDecodeError, AttributeError, LookupError, TypeError):
            own = load_yaml(config.read_text(encoding="utf-8"))["checkpoint"]["dirpath"]
            if Path(own).resolve() == checkpoint.parent.resolve():
                written_there.append(config)
    return str(max(written_there, key=lambda config: config.stat().st_mtime_ns)) if written_there else None


def _in_utf8(before: str, word: str) -> str:
    """Reads a word that is text in UTF-8, whatever the locale; one that is not stays, to be refused."""
    option, equals, _ = word.partition("=")
    with suppress(UnicodeError):
        return decoded_again(word) if (option if equals else before) in TEXTS or before in TEXTS else word
    return word


def _refuse_other_than_utf8(words: list[str]) -> None:
    """Refuses bytes, as of a file's name from another system, that config.yaml and the events cannot hold."""
    for before, word in zip(words, words[1:]):
        if has_half_character(word):
            option, equals, value = word.partition("=")
            option, value = (option, value) if equals and option.startswith("--") else (before, word)
            remedy = "rename a file of such a name, or name it by a pattern such as *.txt"
            raise UserError(f"{option.removeprefix('--')}={value!r} is not UTF-8; {remedy}")


def _verbatim(before: str, word: str) -> str:
    """Keeps a prompt that is no list a text, even one that YAML would read as null, a number or a comment."""
    start = PROMPTS + "=" if word.startswith(PROMPTS + "=") else ""
    if not start and before != PROMPTS:
        return word
    given = word.removeprefix(start)
    # YAML takes the two surrogates by which JSON writes an emoji in ASCII for two characters, or for none.
    for load in (load_yaml, json.loads):
        with suppress(yaml.YAMLError, ValueError, RecursionError):
            prompts = load(given)
            are_texts = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
            if are_texts and not any(map(has_half_character, prompts)):
                return word if load is load_yaml else start + json.dumps(prompts, ensure_ascii=False)
    return start + json.dumps([given], ensure_ascii=False)


def _read_config(path: Path) -> Any:
    """Refuses what YAML readers let pass or report without the file's name."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        given = load_yaml(text)
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(f"--config {path}", error.start, error.object)) from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}{place_and_problem(error, text)}; mend the file") from error
    for name, value in _groups_of(given):
        problem = None
        if isinstance(value, str) and not (name and _may_be_named(value)):
            problem = f"{value[:60]!r}: {without_colon(value)}; write it as `option: value`"
        elif name in GROUPS and not isinstance(value, (str, dict)):  # as where all below it are comments
            remedy = "indent some below it, each as `option: value`, or leave it out"
            problem = f"{name} holds no options; {remedy}"
        if problem is not None:
            raise UserError(f"--config {path}, line {line_of(text, name)}: {problem}")
    _refuse_unbounded(f"--config {path}", given)
    return given


def _groups_of(given: Any) -> Iterator[tuple[str, Any]]:
    """Yields what is to hold options, under its name."""
    if not isinstance(given, dict):
        yield "", given
        return
    yield from ((group, given[group]) for group in GROUPS if group in given)
    model = given.get("model")
    if isinstance(model, dict):
        yield from ((f"model.{group}", model[group]) for group in OF_MODEL if group in model)


def _may_be_named(value: str) -> bool:
    """Tells the name of a file or of a class from options without their colons."""
    return value.endswith((".yaml", ".yml", ".json")) or not re.search(r"[\s:=]", value.strip())


def _refuse_unbounded(name: str, given: Any) -> None:
    """Refuses texts that jsonargparse, looking for numbers and nulls in them, would follow without end."""
    if isinstance(given, str):
        try:
            check_bounded(given)
        except UnboundedError as error:
            raise UserError(f"{name}={given[:60]!r}...: {error.problem}; write it out") from None
        except yaml.YAMLError:
            pass  # no YAML, but text
    elif isinstance(given, dict):
        for key, value in given.items():
            _refuse_unbounded(f"{name}: {key}", value)
    elif isinstance(given, list):
        for value in given:
            _refuse_unbounded(name, value)


def _values(words: list[str]) -> dict[str, list[str]]:
    """Collects the values of every option on the command line, as `--name value` or `--name=value`."""
    values: dict[str, list[str]] = {}
    for word, following in zip(words, [*words[1:], ""]):
        name, equals, value = word.partition("=")
        if name.startswith("-"):
            values.setdefault(name, []).append(value if equals else following)
    return values


def _value(values: dict[str, list[str]], option: str) -> str | None:
    """Returns what the option is set to; None where it is left out, or set to YAML's null."""
    group, _, key = option.rpartition(".")
    given: object = None
    for value in values.get(group, []):
        with suppress(yaml.YAMLError, OSError):
            mapping = load_yaml(Path(value).read_text(encoding="utf-8") if Path(value).is_file() else value)
            given = mapping.get(key, given) if isinstance(mapping, dict) else given
    for value in values.get(option, []):
        given = None if value in YAML_NULL else value
    return None if given is None else str(given)
