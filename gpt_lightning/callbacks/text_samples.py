"""Shows what the model writes by now, after each validation, in TensorBoard's text tab."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.prompts import encode_prompts
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.notes import as_block
from gpt_lightning.training.trainer import loggers_may_fail

N_PROMPTS = 2


class TextSamples(Callback):
    """Continues a few prompts after each validation of a fit, by the `generation` settings.

    Args:
        prompts: What to continue; an empty prompt starts a new document. Null: how held-out documents begin.
    """

    def __init__(self, prompts: list[str] | None = None) -> None:
        self.prompts = prompts
        self.latest: list[str] = []

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
        self.latest = [prompt + text for prompt, text in zip(self.prompts, texts)]
        if trainer.is_global_zero:
            with loggers_may_fail(trainer):
                self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for number, text in enumerate(self.latest):
                    logger.experiment.add_text(f"samples/{number}", as_block(text), trainer.global_step)
                logger.save()
