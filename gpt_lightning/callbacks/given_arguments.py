"""Lets what is said of a callback win over what a checkpoint remembers of it."""

import logging
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

_log = logging.getLogger("gpt_lightning")


class GivenArguments(Callback):
    """Replaces constructor arguments in the states of callbacks, such as EarlyStopping's patience.

    `given` has the arguments that the command line and the files name; of all others a checkpoint decides.
    """

    def __init__(self, given: list[tuple[Callback, Mapping[str, Any]]]) -> None:
        self._given = given

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint["callbacks"] = dict(checkpoint.get("callbacks") or {})
        for callback, arguments in self._given:
            state = states.get(callback.state_key)
            if not isinstance(state, dict):
                continue
            # As the constructor has read them, where it keeps them by their names.
            wanted = {name: getattr(callback, name, value) for name, value in arguments.items()}
            for name in wanted.keys() & state.keys() - {"dirpath"}:
                if _differ(state[name], wanted[name]) and trainer.is_global_zero:
                    name_of = f"{type(callback).__name__}.{name}"
                    _log.info(f"{name_of}={wanted[name]} as given, not {state[name]} as in the checkpoint")
                state = {**state, name: wanted[name]}
            if type(callback) is ModelCheckpoint:
                state = _with_fewer(state, callback)
            states[callback.state_key] = state


def _differ(one: Any, other: Any) -> bool:
    try:
        return bool(one != other)
    except (RuntimeError, ValueError):  # tensors and arrays
        return True


def _with_fewer(state: dict[str, Any], callback: ModelCheckpoint) -> dict[str, Any]:
    """Forgets the worst checkpoints where fewer are wanted: Lightning would keep all, and each new one."""
    scores, wanted = state.get("best_k_models", {}), callback.save_top_k
    if not 0 < wanted < len(scores):
        return state
    kept = sorted(scores, key=lambda path: float(scores[path]), reverse=callback.mode == "max")[:wanted]
    best = {path: scores[path] for path in kept}
    return {**state, "best_k_models": best, "kth_best_model_path": kept[-1], "kth_value": best[kept[-1]]}
