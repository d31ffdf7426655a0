"""Reads multiple-choice questions, one to a line of a JSONL file, and refuses what cannot be scored."""

from pathlib import Path
from typing import Any, NamedTuple

from gpt_lightning.data.charset import not_utf8
from gpt_lightning.data.documents import has_half_character, json_row
from gpt_lightning.exit_codes import UserError


class Item(NamedTuple):
    """Holds a question, what may follow it, and the index of what is right."""

    question: str
    choices: list[str]
    answer: int
    place: str  # file and line


def read_items(path: Path) -> list[Item]:
    """Returns the file's questions in their order; raises UserError that names file and line."""
    if not path.is_file():
        raise UserError(f"tasks={path} does not exist; check the path")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(str(path), error.start, error.object)) from None
    # Not splitlines(): it also splits at characters that a question may hold, such as a form feed.
    lines = enumerate(text.split("\n"), 1)
    items = [_item(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not items:
        raise UserError(f"{path} holds no question; write one JSON object with {_KEYS} a line")
    return items


_KEYS = "question, choices and answer"


def _item(line: str, place: str) -> Item:
    row: Any = json_row(line, place)
    if not isinstance(row, dict):
        raise UserError(f"{place} is no JSON object; write one with {_KEYS}")
    for key in ("question", "choices", "answer"):
        if key not in row:
            raise UserError(f"{place} has no {key}; write an object with {_KEYS}")
    question, choices = row["question"], row["choices"]
    if not isinstance(question, str):
        raise UserError(f"{place}: question={question!r} is no text; put it in quotes")
    if question and not question.strip():
        raise UserError(f"{place}: question={question!r} is nothing but space; write one, or leave it empty")
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{place}: choices={choices!r} is no list of two or more; list what may follow")
    for number, choice in enumerate(choices):
        if not isinstance(choice, str):
            raise UserError(f"{place}: choices[{number}]={choice!r} is no text; put it in quotes")
        if not choice.strip():
            raise UserError(f"{place}: choices[{number}]={choice!r} holds no text; write one, or drop it")
    if any(map(has_half_character, (question, *choices))):
        raise UserError(f"{place} is not UTF-8; write characters, not half of a surrogate pair")
    return Item(question, choices, _index(row["answer"], choices, place), place)


def _index(answer: Any, choices: list[str], place: str) -> int:
    """Returns which of the choices is right, whether it is said by its index or by its text."""
    given, remedy = f"{place}: answer={answer!r}", f"give an index from 0 to {len(choices) - 1}"
    if isinstance(answer, str):
        if (n_alike := choices.count(answer)) != 1:
            problem = "none" if n_alike == 0 else f"{n_alike}"
            raise UserError(f"{given} is the text of {problem} of the choices; {remedy}, or one's text")
        return choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise UserError(f"{given} is no index; {remedy}, or one's text")
    if not 0 <= answer < len(choices):
        raise UserError(f"{given} is no index of {len(choices)} choices; {remedy}")
    return answer
