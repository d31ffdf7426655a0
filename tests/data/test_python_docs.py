"""The built-in corpus: the same at every call, and no paragraph twice."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from gpt_lightning.data import python_docs


@pytest.mark.slow
def test_it_is_a_corpus_without_repeats_or_imports() -> None:
    before = set(sys.modules)
    documents = python_docs.python_documents.__wrapped__()
    assert not {"antigravity", "this", "idlelib"} & (set(sys.modules) - before)
    assert len(documents) > 400 and sum(map(len, documents)) > 1_500_000
    paragraphs = Counter(part.strip() for document in documents for part in document.split("\n\n"))
    assert [text for text, count in paragraphs.items() if count > 1] == []
    assert documents == python_docs.python_documents()


def test_a_module_is_read_without_running_it(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    classes = 'class A:\n    """In A."""\ndef f():\n    """In f.\n\n    Top."""\n'
    code = f'"""Top."""\nopen({str(ran)!r}, "w")\n{classes}'
    (tmp_path / "module.py").write_text(code)
    assert python_docs._docstrings(tmp_path / "module.py") == "Top.\n\nIn A.\n\nIn f.\n\nTop."
    assert not ran.exists()
    (tmp_path / "broken.py").write_text("def (")
    assert python_docs._docstrings(tmp_path / "broken.py") == ""


def test_a_paragraph_is_kept_where_it_first_occurs() -> None:
    seen: set[str] = set()
    assert python_docs._without_repeats("one\n\n  two\n\none\n\nthree", seen) == "one\n\n  two\n\nthree\n"
    assert python_docs._without_repeats("two\n\nfour", seen) == "four\n"
    assert python_docs._without_repeats("one", seen) == ""


def test_fingerprint_names_the_python() -> None:
    assert sys.version in python_docs.python_docs_fingerprint()
