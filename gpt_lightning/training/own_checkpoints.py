"""Takes from a checkpoint, before a run goes on from it, what is another run's: folders, averages."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from gpt_lightning.checkpoint.callback_states import problem_of_saver
from gpt_lightning.checkpoint.files import AVERAGING_KEY, TRAINED_KEY, WEIGHTS, is_own
from gpt_lightning.checkpoint.runs import LAST
from gpt_lightning.checkpoint.values import short
from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.ranks import from_first


def forget_other_folders(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Takes from the states in a checkpoint what lies elsewhere, before the callbacks take them."""
    states = checkpoint.get("callbacks", {})
    for saver in savers(trainer) if trainer.state.fn == TrainerFn.FITTING else ():
        is_here = "://" not in str(saver.dirpath)  # else on a server, of whose names nothing is known
        if is_here and saver.state_key in states:
            states[saver.state_key] = of_own_folder(saver, states[saver.state_key])


def leave_averages_behind(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Has a run that averages no weights go on from those that were trained.

    A checkpoint has the averages in their place, for which the optimizer's state is not.
    """
    averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
    if trainer.state.fn != TrainerFn.FITTING or averages or TRAINED_KEY not in checkpoint:
        return
    rank_zero_warn(
        "the checkpoint's run averaged its weights, and this one does not: it goes on from those that were "
        "trained, and the averages stay behind; to go on with them, add the callback to trainer.callbacks"
    )
    checkpoint[WEIGHTS] = checkpoint.pop(TRAINED_KEY)
    checkpoint.pop(AVERAGING_KEY, None)


def tell_of_other_callbacks(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Names callbacks that had other arguments, by which Lightning tells them apart: they begin anew."""
    if trainer.state.fn != TrainerFn.FITTING:
        return
    own, states = {callback.state_key for callback in trainer.callbacks}, checkpoint.get("callbacks", {})
    for key in own - states.keys():
        kind = key.partition("{")[0]
        if former := [short(other) for other in states.keys() - own if other.partition("{")[0] == kind]:
            rank_zero_warn(f"{key} begins anew: the checkpoint's run had {former[0]}")


def savers(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def of_own_folder(callback: ModelCheckpoint, state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state with the checkpoints that are right in the callback's folder, and no other path.

    What it names is removed when better ones come, or given to loggers, and anybody may have written it.
    """
    if (problem := problem_of_saver(callback.state_key, state)) is not None:
        raise UserError(f"ckpt_path: the checkpoint {problem}")
    former, folder = Path(str(state["dirpath"])), Path(str(callback.dirpath))
    paths = [path for path in (*state["best_k_models"], state["best_model_path"]) if path]
    here = {path: str(folder / Path(path).name) for path in paths if Path(path).parent == former}
    # Ranks have to decide alike, and may not all see the folder.
    own = [path for path in here.values() if is_own(folder, Path(path)) and Path(path).name != LAST]
    present = from_first(own)
    scores = {here[path]: score for path, score in state["best_k_models"].items() if path in here}
    sign = 1 if callback.mode == "min" else -1
    ranked = sorted((p for p in scores if p in present), key=lambda path: sign * float(scores[path]))
    ranked = ranked[: callback.save_top_k] if callback.save_top_k > 0 else ranked
    newest = here.get(state["best_model_path"])
    is_full = bool(ranked) and len(ranked) == callback.save_top_k
    return {
        "dirpath": callback.dirpath,  # of another one Lightning forgets all but one path
        "best_k_models": {path: scores[path] for path in ranked},
        "best_model_path": ranked[0] if ranked else newest if newest in present else "",
        "best_model_score": scores[ranked[0]] if ranked else None,
        "kth_best_model_path": ranked[-1] if is_full else "",
        "kth_value": scores[ranked[-1]] if is_full else torch.tensor(sign * float("inf")),
        "last_model_path": str(folder / LAST) if state["last_model_path"] else "",
    }
