"""A fit says at its start how much memory it will take, as a plan does, and warns where there is less."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gpt_lightning.__main__ import main
from gpt_lightning.callbacks import memory_estimate
from gpt_lightning.kernels.device import GIB
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.planning.memory import memory_of
from gpt_lightning.planning.setup import Setup
from tests.log import untimed


@pytest.mark.parametrize("there, warns", [(64 * GIB, False), (GIB // 4, True), (None, False)])
def test_a_fit_begins_with_its_estimate(
    there: int | None,
    warns: bool,
    tiny_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(memory_estimate, "available_host_memory", lambda: there)
    path = tiny_config(trainer={"max_steps": 1, "val_check_interval": 1, "accumulate_grad_batches": 2})
    main(["fit", "--config", str(path), "--model.activation_checkpointing", "true"])
    lines = untimed(capsys.readouterr().err).splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("model of"))
    options = yaml.safe_load(path.read_text())["model"]["config"]
    setup = Setup(
        GPTConfig(**{**options, "vocab_size": 300}),
        16,
        4,
        accumulation=2,
        activation_checkpointing=True,
        on_cpu=True,
    )
    expected = f"memory of about {memory_of(setup).peak / GIB:.2f} GiB"
    assert lines[at + 1] == expected + ("" if there is None else f" of {there / GIB:.2f}")
    assert lines[at + 2].startswith("warning: the run is expected to need more memory") is warns
    assert len(re.findall("memory of about", "\n".join(lines))) == 1
