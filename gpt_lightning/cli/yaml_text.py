"""Reads YAML of anybody: what would grow without end, or stands in it twice, is an error with its line."""

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
    mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
    if mark is None:
        return f": {problem or error}"
    number, lines = mark.line, text.splitlines()
    above = lines[number - 1] if 0 < number <= len(lines) else ":"
    match str(problem).split("'")[0]:
        case "could not find expected ":  # seen where the next line begins
            start = getattr(error, "context_mark", None) or mark
            number, problem = start.line, "the option has no colon after it"
        case "mapping values are not allowed here" if ":" not in above:
            number, problem = number - 1, "the option has no colon after it"
        case "mapping values are not allowed here" if lines[number].count(": ") > 1:
            problem = "it has a second colon; put the value into quotes"
        case "mapping values are not allowed here":
            problem = "it is indented deeper than the line above, which has a value"
        case "expected <block end>, but found ":
            problem = "it is not indented as the lines above it"
        case "found character " if "\\t" in str(problem):
            problem = "it has a tab where spaces are to be"
    return f", line {number + 1}: {problem}"


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"the key {key.value} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
