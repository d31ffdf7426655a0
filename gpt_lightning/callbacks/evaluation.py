"""Asks the model questions while it trains, and logs how many it answers rightly."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from gpt_lightning.data.loader import rank_and_ranks
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.evaluation.multiple_choice import Result
from gpt_lightning.evaluation.scoring import Scorer
from gpt_lightning.evaluation.tasks import evaluate, open_tasks, prepare
from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.parallel.ranks import gathered
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.prediction import whole_model
from gpt_lightning.training.trainer import counted_as, loggers_may_fail


class Evaluation(Callback):
    """Logs `eval/<task>/acc` and `acc_norm` of multiple-choice questions, and what else a task measures.

    Training goes on as if nothing had been asked: its random numbers, its data and its modes stay.

    Args:
        tasks: Files of questions (.jsonl), and names of lm-eval's tasks.
        every_n_steps: Ask every so many optimizer steps, and at the last; after each validation by default.
        limit: Ask the first so many questions of each task; all of them by default.
        batch_tokens: Tokens of a pass, with padding: more are faster and take more memory.
    """

    def __init__(
        self,
        tasks: list[str] | str = [],
        every_n_steps: int | None = None,
        limit: int | None = None,
        batch_tokens: int = 8192,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("limit", limit)):
            if value is not None and value < 1:
                raise UserError(f"evaluate.{name}={value} is below 1; raise it, or leave it out")
        if batch_tokens < 1:
            raise UserError(f"evaluate.batch_tokens={batch_tokens} is below 1; raise it")
        self.every_n_steps, self.batch_tokens = every_n_steps, batch_tokens
        self.tasks = open_tasks(tasks, limit)
        self._scorer: Scorer | None = None  # where there is something to ask
        self._seen_step = self._asked_step = 0

    def prepare(self, model: GPTModel, tokenizer: TextTokenizer) -> None:
        """Finds what the model cannot be asked, before a run begins; its weights need not be there yet."""
        self._scorer = Scorer(model, tokenizer, self.batch_tokens)
        prepare(self.tasks, self._scorer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.tasks:
            return
        assert isinstance(pl_module, GPTLightningModule)
        if (tokenizer := pl_module.own_tokenizer) is None:
            raise UserError("evaluate.tasks: there is no tokenizer to read with; set module.tokenizer")
        if self._scorer is None or self._scorer.model is not pl_module.model:
            self.prepare(pl_module.model, tokenizer)
            assert self._scorer is not None
        rank, ranks = rank_and_ranks(trainer)
        peers = trainer.world_size // ranks  # tensor-parallel ones, of which the first speaks for all
        gather = partial(_gather, peers=peers)
        self._scorer = replace(self._scorer, rank=rank, ranks=ranks, gather=gather)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = self._asked_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen_step:  # the batch was accumulated, the step is not done
            return
        self._seen_step = step
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            self._ask(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_in_fit = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if is_in_fit and self.every_n_steps is None:
            self._ask(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._asked_step != trainer.global_step:
            self._ask(trainer, pl_module)

    def _ask(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Has all ranks answer together, and all know what came of it."""
        self._asked_step = trainer.global_step
        if not self.tasks:
            return
        assert self._scorer is not None
        torch.get_device_module(pl_module.device).synchronize()  # steps are to be counted as such
        with counted_as(trainer, "validation"), isolate_rng(include_cuda=False), whole_model(trainer):
            # In eager mode, since each length of a text would be compiled.
            with torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context():
                results = evaluate(self.tasks, self._scorer)
        self._log(trainer, results)

    def _log(self, trainer: Trainer, results: Sequence[Result]) -> None:
        numbers = {
            f"eval/{result.task}/{name}": value
            for result in results
            for name, value in result.metrics.items()
        }
        # A checkpoint may be kept by them: `checkpoint.monitor` of eval/mine/acc.
        tensors = {name: torch.tensor(value) for name, value in numbers.items()}
        trainer.callback_metrics.update(tensors)
        trainer.logged_metrics.update(tensors)
        if trainer.progress_bar_callback is not None:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            trainer.progress_bar_callback.print(f"step {trainer.global_step:,}: {figures}")
        with loggers_may_fail(trainer):
            for logger in trainer.loggers:
                logger.log_metrics(numbers, trainer.global_step)
                logger.save()


def _gather(share: Any, peers: int) -> list[Any]:
    return gathered(share)[::peers]
