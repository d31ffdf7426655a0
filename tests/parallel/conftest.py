from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_corpus
from tests.parallel.runs import Run, run_everywhere


@pytest.fixture(scope="session")
def shared_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that many runs read, with the cache beside it: tokenized once."""
    return write_corpus(tmp_path_factory.mktemp("parallel") / "corpus.jsonl")


@pytest.fixture(scope="session")
def one_process(shared_corpus: Path) -> Callable[..., dict[str, Any]]:
    """What a run in one process gives, computed once for each set of options."""
    known: dict[str, dict[str, Any]] = {}

    def run(**options: Any) -> dict[str, Any]:
        key = repr(sorted(options.items(), key=repr))
        if key not in known:
            known[key] = run_everywhere(Run(**options), shared_corpus)[0]
        return known[key]

    return run
