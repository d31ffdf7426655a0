"""Reads YAML of anybody: what would grow without end, or stands in it twice, is an error with its line."""

import re
from contextlib import suppress
from typing import Any

import yaml

DEEPEST, MOST_COPIES = 100, 10_000  # levels of nesting; values that aliases repeat
_HARMLESS = 200  # characters, in which no nesting comes near to it


class UnboundedError(yaml.MarkedYAMLError):
    """Tells of a text that readers would follow until their stack or the memory ends."""


def load_yaml(text: str) -> Any:
    """Reads a text in which a key may stand once; the usual reader lets the last one win without a word."""
    check_bounded(text)
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (ValueError, TypeError, OverflowError) as error:  # of a value, such as a date without a 13th month
        raise yaml.YAMLError(str(error)) from error


def check_bounded(text: str) -> None:
    """Follows the text's events, which takes no stack, and raises UnboundedError."""
    if len(text) < _HARMLESS and "*" not in text:  # without which there is no alias
        return
    sizes: dict[str | None, int] = {}  # of the values with an anchor
    is_open: list[tuple[str | None, int]] = []  # anchors of the values around, and how much was before them
    n_values = n_copies = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        problem: str | None = None
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 0)
            n_values, n_copies = n_values + size, n_copies + size
            if any(anchor == event.anchor for anchor, _ in is_open):
                problem = f"the alias *{event.anchor} stands within itself"
            elif n_copies > MOST_COPIES:
                problem = f"its aliases repeat more than {MOST_COPIES:,} values"
        elif isinstance(event, yaml.CollectionStartEvent):
            is_open.append((event.anchor, n_values))
            n_values += 1
            if len(is_open) > DEEPEST:
                problem = f"it is nested deeper than {DEEPEST} levels"
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = is_open.pop()
            if anchor is not None:
                sizes[anchor] = n_values - before
        elif isinstance(event, yaml.ScalarEvent):
            n_values += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if problem is not None:
            raise UnboundedError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]


def place_and_problem(error: yaml.YAMLError, text: str) -> str:
    """Returns `, line 3: what is wrong there`, in words for who wrote the text, or without the line."""
    error = _in_plain_words(error, text)
    mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
    if mark is None:
        return f": {problem or error}"
    opened = getattr(error, "context_mark", None) or mark
    number, lines = mark.line, text.splitlines()
    match str(problem).split("'")[0]:
        case "could not find expected ":  # seen where the next line begins
            number, problem = opened.line, without_colon(lines[opened.line])
        case "mapping values are not allowed here":
            number, problem = _second_value(number, lines)
        case "found unexpected end of stream":
            number, problem = opened.line, "a quote is opened and not closed"
        case "expected ":  # a comma or a closing bracket
            number, problem = _in_brackets(str(problem), opened.line, number)
        case "expected <block end>, but found " if (quoted := _quoted_before(mark, text)) is not None:
            number, problem = quoted, "a quote is opened, and other text follows where it is closed"
        case "expected <block end>, but found ":
            problem = "it is not indented as the lines above it"
        case "found character " if "\\t" in str(problem):
            problem = "it has a tab where spaces are to be"
    return f", line {number + 1}: {problem}"


def _in_plain_words(error: yaml.YAMLError, text: str) -> yaml.YAMLError:
    """Returns what Python's own parser says of a mistake: the fast one, in C, has fewer words for it."""
    if isinstance(error, (yaml.scanner.ScannerError, yaml.parser.ParserError)):
        try:
            for _ in yaml.parse(text, Loader=yaml.SafeLoader):
                pass
        except yaml.YAMLError as plain:
            return plain
    return error


def _second_value(number: int, lines: list[str]) -> tuple[int, str]:
    """Says why there cannot be a value where one begins, and in which line the reason stands."""
    above = next((other for other in range(number - 1, -1, -1) if lines[other].strip()), number)
    if not re.search(r":(\s|$)", lines[above]):
        return above, without_colon(lines[above])
    if lines[number].count(": ") > 1:
        return number, "it has a second colon; put the value into quotes"
    return number, "it is indented deeper than the line above, which has a value"


def _in_brackets(problem: str, opened: int, number: int) -> tuple[int, str]:
    """Says what is wrong in a list or mapping in brackets, and in which line."""
    if problem.endswith("'<scalar>'"):
        return number, "a comma is missing between two values in brackets"
    if problem.endswith("'<stream end>'") or number > opened:
        return opened, "a bracket is opened and not closed"
    return number, problem


def _quoted_before(mark: yaml.Mark, text: str) -> int | None:
    """Returns the line in which the value begins that is in quotes and ends in the line of the mark."""
    last: yaml.Token | None = None
    with suppress(yaml.YAMLError):
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if token.start_mark.index >= mark.index:
                break
            last = token
    if isinstance(last, yaml.ScalarToken) and not last.plain and last.end_mark.line == mark.line:
        return int(last.start_mark.line)
    return None


def without_colon(line: str) -> str:
    """Says what stands where the colon of an option, and a blank, are to be."""
    if re.match(r"\s*[\w.]+:\S", line):
        return "a blank is missing after the colon"
    if re.match(r"\s*[\w.]+\s*=", line):
        return "the option has = after it, and a colon is to be there"
    return "the option has no colon after it"


def line_of(text: str, name: str) -> int:
    """Returns the line in which the value of an option, as `model.config`, begins."""
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    for part in filter(None, name.split(".")):
        node = next((value for key, value in node.value if key.value == part), node)
    return int(node.start_mark.line) + 1


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"the key {key.value} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
