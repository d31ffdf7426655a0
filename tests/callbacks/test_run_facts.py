"""The facts of a run are true of it."""

import os
import subprocess
from pathlib import Path

import pytest

from gpt_lightning.callbacks.run_facts import commit, parameters_by_part
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel

SHAPE = dict(vocab_size=11, max_position_embeddings=5, n_layers=2, n_heads=2, d_model=4)


def test_parameters_are_counted_by_part() -> None:
    # By hand: weights and biases of two blocks; the head is tied.
    attn, mlp = 2 * (12 * 4 + 12 + 4 * 4 + 4), 2 * (16 * 4 + 16 + 4 * 16 + 4)
    expected = {"token_embedding": 44, "position_embedding": 20, "norms": 5 * 8, "attn": attn, "mlp": mlp}
    assert parameters_by_part(GPTConfig(**SHAPE)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
def test_the_parts_add_up(tied: bool) -> None:
    config = GPTConfig(
        **SHAPE,  # type: ignore[arg-type]
        positions="rope",
        norm="rms",
        qk_norm=True,
        activation="swiglu",
        tie_embeddings=tied,
    )
    parts = parameters_by_part(config)
    assert sum(parts.values()) == sum(each.numel() for each in GPTModel(config).parameters())
    assert ("lm_head" in parts) is not tied


def test_the_commit_is_that_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None
    who = {f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    (tmp_path / "file").write_text("1")
    for words in ("init -q", "add file", "commit -qm first"):
        subprocess.run(["git", *words.split()], check=True, env={**os.environ, **who})
    assert (first := commit()) is not None and len(first) == 12
    (tmp_path / "file").write_text("2")
    assert commit() == f"{first}-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit() is None
