"""Tells of the texts of a run what a checkpoint keeps, and refuses to go on with others."""

from collections.abc import Sequence
from typing import Any

from gpt_lightning.data.mixture import Mixture
from gpt_lightning.data.text_source import TextSource
from gpt_lightning.exit_codes import UserError


def state_of_texts(sources: Sequence[TextSource], mixture: Mixture | None) -> dict[str, Any]:
    """Describes the one text, or the mixture with each of its texts."""
    texts = {source.name: source.trained_text.described for source in sources}
    if mixture is None:
        return {"text": texts[None]}
    return {"text": {}, "mixture": {**mixture.state(), "texts": texts}}


def resume_texts(sources: Sequence[TextSource], mixture: Mixture | None, state: dict[str, Any]) -> None:
    """Refuses, now and from now on, other texts or another mixture than the state's run had."""
    saved = state.get("mixture")
    if state and (mixture is None) != (saved is None):
        has, had = ("data.train_files", "data.mixture")[:: 1 if mixture is None else -1]
        problem = f"this run trains on {has}, and that of the checkpoint on {had}"
        raise UserError(f"{problem}; give the text as it was, or train anew")
    if mixture is not None and saved is not None:
        mixture.resume(saved)
    for source in sources:
        source.trained_text.resume(_described(source, state))


def warning_of_texts(sources: Sequence[TextSource], state: dict[str, Any], verb: str) -> str | None:
    """Warns that a model may know what it is judged on, in the first text of which that is so."""
    found = (source.trained_text.warning(_described(source, state), verb) for source in sources)
    return next((warning for warning in found if warning is not None), None)


def _described(source: TextSource, state: dict[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint's state says of the text of a source, if anything."""
    described: dict[str, Any]
    if source.name is None:
        described = state.get("text", {})
    else:
        described = state.get("mixture", {}).get("texts", {}).get(source.name, {})
    return described
