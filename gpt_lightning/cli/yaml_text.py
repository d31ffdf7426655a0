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


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"the key {key.value} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
