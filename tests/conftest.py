import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

# Imported before any test captures stderr: Lightning's log handlers keep the stream that they find.
import gpt_lightning.cli.app  # noqa: F401
from gpt_lightning.kernels.choose import PIN
from tests.shapes import by_gpt2s_recipe

WORDS = "the cat dog house garden sees likes finds a red small old new river and with under over".split()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=10, help="of the soak in tests/faults; 100 for long")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault(PIN, "packed,quantized,onednn,linear,plain")  # whatever is fastest here
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with what takes longest, so that no worker is left alone with it at the end.

    What counts the seconds until ranks are given up is kept to one worker, where it mostly waits.
    """
    for item in items:
        if item.path.stem in ("test_lost_ranks", "test_rank_watch"):
            item.add_marker(pytest.mark.xdist_group("timeouts"))
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, "faults" not in item.keywords))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl")


def write_corpus(path: Path) -> Path:
    """Forty short documents of a made-up language."""
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(40):
            sentences = [" ".join(generator.choices(WORDS, k=8)).capitalize() + "." for _ in range(6)]
            file.write(json.dumps({"text": "\n".join(sentences)}) + "\n")
    return path


@pytest.fixture
def tiny_config(tmp_path: Path, corpus: Path) -> Callable[..., Path]:
    """Writes tiny.yaml, a whole run of a few seconds; keyword arguments replace its sections."""

    def write(**sections: object) -> Path:
        settings: dict[str, object] = {
            "data": {
                "train_files": [str(corpus)],
                "tokenizer": "bpe:300",
                "seq_len": 16,
                "batch_size": 4,
                "cache_dir": str(tmp_path / "cache"),
            },
            "model": {
                "config": {"max_position_embeddings": 16, "n_layers": 2, "n_heads": 2, "d_model": 16},
                "optimizer": {"learning_rate": 0.01},
                "schedule": {"warmup_steps": 2},
            },
            "generation": {"max_new_tokens": 12},
            "trainer": {
                "max_steps": 6,
                "val_check_interval": 3,
                "log_every_n_steps": 1,
                "default_root_dir": str(tmp_path),
                "accelerator": "cpu",
            },
        }
        for name, section in sections.items():
            settings[name] = {**settings.get(name, {}), **section}  # type: ignore[dict-item]
        settings["model"] = by_gpt2s_recipe(settings["model"])  # type: ignore[arg-type]
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    return write


@pytest.fixture(autouse=True)
def freed_memory_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' process outlives their runs, and some measure its memory."""
    monkeypatch.setattr("gpt_lightning.training.module.keep_freed_memory", lambda: None)
