"""Shows what the model writes by now, after each validation, in TensorBoard's text tab."""

import re
from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.prompts import encode_prompts
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.notes import REPETITION, SAMPLES, as_block
from gpt_lightning.training.trainer import loggers_may_fail

N_PROMPTS = 2
# A word, a sign, or where words are written without spaces a character.
_WORD = re.compile(r"[^\W\u2e80-\u9fff]+|\S")


class TextSamples(Callback):
    """Continues a few prompts after each validation of a fit, by the `generation` settings.

    Args:
        prompts: What to continue; an empty prompt starts a new document. Null: how held-out documents begin.
    """

    def __init__(self, prompts: list[str] | None = None) -> None:
        self.prompts = prompts
        self.latest: list[str] = []
        self.step = 0  # at which they were written

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        if self.prompts is None:
            self.prompts = data.beginnings("val", N_PROMPTS) if isinstance(data, TextDataModule) else [""]
        elif isinstance(data, TextDataModule):
            data.hint_at_special_tokens(self.prompts)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GPTLightningModule)
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not self.prompts:
            return
        # Every rank generates: the peers of a tensor-parallel group can only do it together.
        if (tokenizer := pl_module.own_tokenizer) is None:
            rank_zero_warn("TextSamples: there is no tokenizer to write with; set module.tokenizer")
            self.prompts = []
            return
        data = trainer.datamodule
        parses = isinstance(data, TextDataModule) and data.parse_special_tokens
        texts = pl_module.complete(tokenizer, encode_prompts(self.prompts, tokenizer, parses))
        self.step = trainer.global_step
        self.latest = [prompt + text for prompt, text in zip(self.prompts, texts)]
        if trainer.is_global_zero:
            with loggers_may_fail(trainer):
                self._show(trainer, repeated_share(texts))

    def _show(self, trainer: Trainer, repeated: float | None) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for number, text in enumerate(self.latest):
                    logger.experiment.add_text(f"{SAMPLES}{number}", as_block(text), trainer.global_step)
            if repeated is not None:
                logger.log_metrics({REPETITION: repeated}, trainer.global_step)
            logger.save()


def repeated_share(texts: Sequence[str], n: int = 4) -> float | None:
    """Returns which part of the n-grams of a text were in it before, as a mean of all that have any.

    Welleck et al., 2020, call it seq-rep-n: a model that goes round in circles shows in it. It is taken of
    words, not of tokens, so that it can be compared across tokenizers.
    """
    words = map(_WORD.findall, texts)
    grams = [[tuple(some[start : start + n]) for start in range(len(some) - n + 1)] for some in words]
    shares = [1 - len(set(some)) / len(some) for some in grams if some]
    return sum(shares) / len(shares) if shares else None
