"""What is said of a callback wins over what a checkpoint remembers of it."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from gpt_lightning.callbacks.given_arguments import GivenArguments


class Anybodys(Callback):
    """Takes back all that it was made with, as many do."""

    def __init__(self, every: int = 1, share: Any = None) -> None:
        self.every, self.share, self.count = every, share, 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


def restored(callback: Callback, given: dict[str, Any], state: dict[str, Any]) -> Any:
    """The callback after a resume from a checkpoint that holds this state."""
    checkpoint = {"callbacks": {callback.state_key: state}}
    trainer = cast(Trainer, SimpleNamespace(is_global_zero=True))
    GivenArguments([(callback, given)]).on_load_checkpoint(trainer, cast(LightningModule, None), checkpoint)
    callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    return callback


def test_what_is_given_wins_and_the_rest_is_remembered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="gpt_lightning")
    state = EarlyStopping("val/loss", patience=3).state_dict() | {"wait_count": 2}
    stopping = restored(EarlyStopping("val/loss", patience=8), {"patience": 8}, state)
    assert (stopping.patience, stopping.wait_count) == (8, 2)
    (line,) = caplog.messages
    assert line == "EarlyStopping.patience=8 as given, not 3 as in the checkpoint"
    assert restored(EarlyStopping("val/loss", patience=8), {}, state).patience == 3
    remembered = {"every": 7, "share": torch.ones(2), "count": 4}
    other = restored(Anybodys(2, torch.zeros(2)), {"every": "2", "share": "[0, 0]"}, remembered)
    assert (other.every, other.count) == (2, 4) and not other.share.any()


@pytest.mark.parametrize(
    "mode, wanted, kept, last",
    [("min", 2, {"a", "c"}, "c"), ("max", 1, {"b"}, "b"), ("min", 3, {"a", "b", "c"}, "b")],
)
def test_fewer_checkpoints_that_are_wanted_are_fewer(
    mode: str, wanted: int, kept: set[str], last: str
) -> None:
    scores = {name: torch.tensor(score) for name, score in (("a", 1.0), ("b", 3.0), ("c", 2.0))}
    former = ModelCheckpoint("here", monitor="val/loss", mode=mode, save_top_k=3)
    former.best_k_models, former.kth_best_model_path, former.kth_value = scores, "b", scores["b"]
    callback = ModelCheckpoint("here", monitor="val/loss", mode=mode, save_top_k=wanted)
    restored(callback, {"save_top_k": wanted}, former.state_dict())
    assert callback.best_k_models.keys() == kept and callback.kth_best_model_path == last
    assert callback.kth_value == scores[last]
