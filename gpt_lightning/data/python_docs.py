"""Gives the text that every Python carries, its own documentation, as the source `python:docs`.

About 600 documents and 2 MB of real English prose and code examples, read at run time: a first training
needs neither a download nor a file of one's own.
"""

import ast
import functools
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SOURCE_NAME = "python:docs"

_FORMAT = 1
# Folders of the standard library that hold tests, programs or other people's packages.
_LEFT_OUT = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages"}


def python_docs_fingerprint() -> str:
    """Changes when another Python would give other text."""
    return f"{SOURCE_NAME} format {_FORMAT}, Python {sys.version}"


@functools.cache
def python_documents() -> tuple[str, ...]:
    """Yields the language reference by topic, then the docstrings of each module, in a fixed order."""
    # A paragraph is kept where it first occurs, so none can be both trained on and held out.
    seen: set[str] = set()
    documents = (_without_repeats(text, seen) for text in (*_topics(), *_module_docstrings()))
    return tuple(document for document in documents if document)


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return
    yield from (topics[name] for name in sorted(topics))


def _module_docstrings() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts[:-1]):
            yield _docstrings(path)


def _docstrings(path: Path) -> str:
    """Lists the docstrings of a module in source order, without importing it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and samples of broken code are no modules
        return ""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(docstring for node in nodes if (docstring := ast.get_docstring(node)))


def _without_repeats(text: str, seen: set[str]) -> str:
    kept = []
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        key = paragraph.strip()
        if key and key not in seen:
            seen.add(key)
            kept.append(paragraph.strip("\n"))
    document = "\n\n".join(kept).strip()
    # A lone surrogate in a docstring's escape has no UTF-8 form.
    return document.encode("utf-8", errors="ignore").decode("utf-8") + "\n" if document else ""
