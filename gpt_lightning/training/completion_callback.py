"""For callbacks that follow `predict` from within: all prompts of a rank are one batch."""

from typing import Any

from lightning.pytorch import Callback


class CompletionCallback(Callback):
    """Told by `predict_step`; tensor-parallel peers, which generate together, are all told the same."""

    def on_new_token(self) -> None:
        """One more token of some completion is there, the eos not counted."""

    def on_completion(self, row: dict[str, Any]) -> None:
        """A completion has ended; `row` is as `predict_step` returns it."""
