"""What a file says of Lightning's callbacks is held to what these go on from, and refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.checkpoint.files import write
from gpt_lightning.exit_codes import UserError

OLD = Path(__file__).parents[1] / "old_files" / "file.ckpt"
WEIGHT = "model.blocks.0.attn.qkv_proj.weight"
STOPPING = "EarlyStopping{'monitor': 'val/loss', 'mode': 'min'}"
SAVER = "ModelCheckpoint{'monitor': 'val/loss'}"
AVERAGING = "EMAWeightAveraging"
SWA = "StochasticWeightAveraging"
GONE = "is left out"


@pytest.fixture
def trained() -> dict[str, Any]:
    """A run's checkpoint at step 5, as it is with callbacks of Lightning's."""
    contents: dict[str, Any] = torch.load(OLD, weights_only=True)
    contents["callbacks"] |= {
        STOPPING: {
            **{"wait_count": 1, "stopped_epoch": 0, "best_score": torch.tensor(5.0), "patience": 3},
            **{"stopping_reason": 0, "stopping_reason_message": None},
        },
        SAVER: {
            **{"monitor": "val/loss", "best_model_score": None, "best_model_path": "", "dirpath": "runs"},
            **{"best_k_models": {}, "kth_best_model_path": "", "kth_value": torch.tensor(float("inf"))},
            **{"last_model_path": "", "current_score": None},
        },
        AVERAGING: {"latest_update_step": 5},
        SWA: {
            **{"n_averaged": 3, "latest_update_epoch": 2},
            "average_model_state": dict(contents["state_dict"]),
            "scheduler_state": {
                **{"_anneal_strategy": "cos", "anneal_epochs": 10, "base_lrs": [0.1, 0.1], "last_epoch": 43},
                **{"_step_count": 3, "_is_initial": False, "_get_lr_called_within_step": False},
                "_last_lr": [0.2, 0.2],
            },
        },
        "Timer": {"time_elapsed": {"train": 1.5}},
        "Mine": {1: "anything", "wait_count": []},
    }
    contents["current_model_state"] = {
        name: value + 1 for name, value in contents["state_dict"].items() if "head" not in name
    }
    table = contents["current_model_state"]["model.token_embedding.weight"]
    contents["current_model_state"]["model.lm_head.weight"] = table
    contents["averaging_state"] = {"n_averaged": torch.tensor(5)}
    contents["MixedPrecision"] = {
        **{"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5},
        **{"growth_interval": 2000, "_growth_tracker": 4},
    }
    return contents


def test_honest_states_pass(trained: dict[str, Any], tmp_path: Path) -> None:
    del trained["callbacks"][STOPPING]["stopping_reason"]  # which earlier versions of Lightning did not keep
    trained["callbacks"]["MyAverages"] = {
        **{"n_averaged": 0, "latest_update_epoch": -1, "average_model_state": None, "scheduler_state": None}
    }
    write(trained, tmp_path / "x.ckpt")
    assert Checkpoint.open(tmp_path / "x.ckpt").step == 5


CHANGES: list[tuple[Any, ...]] = [
    *(
        ("callbacks", STOPPING, name, value)
        for name in ("wait_count", "stopped_epoch", "patience", "best_score", "stopping_reason")
        for value in ("x", -1, float("nan"), torch.zeros(3), torch.tensor(1j))
    ),
    *(("callbacks", STOPPING, name, GONE) for name in ("wait_count", "best_score", "patience")),
    ("callbacks", STOPPING, "best_score", 1.0),
    ("callbacks", STOPPING, "best_score", torch.tensor(float("nan"))),
    ("callbacks", "MyStopping", {"wait_count": "x", "best_score": None}),
    *(("callbacks", key, {}) for key in (STOPPING, SAVER, AVERAGING, "Timer", "RunCheckpoint{}")),
    *(("callbacks", SAVER, name, GONE) for name in ("best_k_models", "dirpath", "best_model_score")),
    *(("callbacks", SAVER, name, "x") for name in ("best_model_score", "kth_value")),
    *(
        ("callbacks", SAVER, "best_k_models", {"runs/a.ckpt": score})
        for score in (float("nan"), torch.tensor(1j), 10**400, torch.tensor(True))
    ),
    *(("callbacks", AVERAGING, "latest_update_step", step) for step in ("x", -1, 6, 1.5, None)),
    ("callbacks", "MyAverage", {"latest_update_step": "x"}),
    ("callbacks", "Timer", "time_elapsed", {"train": "x"}),
    ("callbacks", SWA, {}),
    ("callbacks", "MyAverages", {"n_averaged": "x", "average_model_state": None}),
    *(("callbacks", SWA, "n_averaged", value) for value in ("x", -1, None, GONE)),
    *(("callbacks", SWA, "latest_update_epoch", value) for value in ("x", -2, 1.5, torch.zeros(3), GONE)),
    *(("callbacks", SWA, "scheduler_state", value) for value in ("x", {}, [1], GONE)),
    *(("callbacks", SWA, "average_model_state", value) for value in ("x", [1], {1: 2}, GONE)),
    *(
        ("callbacks", SWA, "scheduler_state", name, value)
        for name in ("_anneal_strategy", "anneal_epochs", "base_lrs", "last_epoch", "_step_count")
        for value in ("x", -1, None, GONE)
    ),
    *(("callbacks", SWA, "scheduler_state", name, None) for name in ("optimizer", "get_lr", "_update_lr")),
    *(("MixedPrecision", value) for value in ("x", {}, [1], None)),
    *(
        ("MixedPrecision", name, value)
        for name in ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
        for value in ("x", -1, 0.3j, float("nan"), torch.ones(3), torch.tensor(0.5), None, [1], GONE)
    ),
    *(("MixedPrecision", name, 0) for name in ("scale", "growth_interval")),
    ("MyPrecision", {"scale": "x", "_growth_tracker": 0}),
    ("native_amp_scaling_state", {"scale": "x"}),
    *(("current_model_state", value) for value in (7, None, {}, [1], GONE)),
    *(
        ("current_model_state", WEIGHT, value)
        for value in (GONE, "x", torch.zeros(1), torch.zeros(48, 16).bool(), torch.zeros(48, 16).int())
    ),
    ("current_model_state", 3, torch.zeros(1)),
    ("current_model_state", "model.lm_head.weight", torch.zeros(300, 16)),
    *(("averaging_state", value) for value in (7, None, {}, [1], GONE)),
    *(
        ("averaging_state", "n_averaged", value)
        for value in ("x", 5, torch.tensor(-1), torch.tensor(5.0), torch.tensor([5]), torch.tensor(1j))
    ),
    ("averaging_state", f"module.{WEIGHT}", torch.zeros(48, 16)),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: " ".join(map(str, change[-3:]))[:60])
def test_others_are_refused_in_one_line(
    change: tuple[Any, ...], trained: dict[str, Any], tmp_path: Path
) -> None:
    *way, last, value = change
    place: Any = trained
    for key in way:
        place = place[key]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    torch.save(trained, tmp_path / "evil.ckpt")
    with pytest.raises(UserError) as error:
        Checkpoint.open(tmp_path / "evil.ckpt")
    assert str(error.value).startswith(f"ckpt_path={tmp_path}/evil.ckpt ") and "\n" not in str(error.value)
