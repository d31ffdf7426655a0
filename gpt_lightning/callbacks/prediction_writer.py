"""Writes predictions: one JSON line a completion in prompt order, and the texts for people to read."""

import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from gpt_lightning.callbacks.terminal import for_readers
from gpt_lightning.checkpoint.atomic import written_file
from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.data.loader import is_first_of_replica
from gpt_lightning.generation.journal import (
    Journal,
    Settings,
    finished_prompts,
    journal_settings,
    read_journals,
    remove_journals,
)
from gpt_lightning.parallel.ranks import from_first, gathered
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.prediction import CompletionCallback

_log = logging.getLogger("gpt_lightning")


class PredictionWriter(CompletionCallback):
    """Writes the completions of all ranks, each once: into `output`, and as text to `stream`.

    With the `checkpoint` of the weights, what is finished is kept in journals beside `output`, and a
    run with the same weights, prompts and settings goes on from there, on however many ranks.
    """

    def __init__(self, output: Path, stream: TextIO, checkpoint: Checkpoint | None = None) -> None:
        self.output = output
        self.stream = stream
        self.checkpoint = checkpoint
        self._is_keeping = True
        self._journal: Journal | None = None
        self._finished: list[dict[str, Any]] = []  # by earlier runs; on the rank that writes
        self._rows: list[dict[str, Any]] = []

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finished, self._rows = [], []
        # Tensor-parallel peers have the same rows.
        self._is_keeping = is_first_of_replica(trainer)
        if self.checkpoint is not None:
            assert isinstance(pl_module, GPTLightningModule)
            options = {f"generation.{name}": value for name, value in asdict(pl_module.generation).items()}
            options["trainer.precision"] = trainer.precision
            options["data.parse_special_tokens"] = trainer.datamodule.parse_special_tokens
            settings = journal_settings(self.checkpoint.digest, trainer.datamodule.all_prompts, options)
            settings = from_first(settings)  # all ranks must take the same, and need not see the same files
            self._go_on(trainer, settings, pl_module.generation.num_samples)
            if self._is_keeping:
                self._journal = Journal(self.output, trainer.global_rank, settings)

    def _go_on(self, trainer: Trainer, settings: Settings, num_samples: int) -> None:
        """Takes over what earlier runs have finished, from the disks of all nodes."""
        found = gathered(read_journals(self.output, settings) if trainer.local_rank == 0 else ([], []))
        finished = finished_prompts((row for rows, _ in found for row in rows), num_samples)
        trainer.datamodule.finished_prompts.update(finished)  # before the prompts are dealt
        if not trainer.is_global_zero:
            return
        self._finished = [row for rows in finished.values() for row in rows]
        differences = sorted({difference for _, others in found for difference in others})
        if differences:
            _log.info(f"beginning anew, not with what an earlier run had finished: {'; '.join(differences)}")
        if finished:
            total = len(trainer.datamodule.all_prompts) * num_samples
            were = "completions were" if total != 1 else "completion was"
            _log.info(f"resuming: {len(self._finished):,} of {total:,} {were} finished")

    @override
    def on_completion(self, row: dict[str, Any]) -> None:
        if self._is_keeping:
            self._rows.append(row)
            if self._journal is not None:
                self._journal.append(row)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = self._finished + [row for part in gathered(self._rows) for row in part]
        rows.sort(key=lambda row: (row["index"], row.get("sample", 0)))
        if trainer.is_global_zero:
            self._write(rows)
        self._journal = None
        if self.checkpoint is not None:
            trainer.strategy.barrier("predictions written")
            if trainer.local_rank == 0:
                remove_journals(self.output)
        if trainer.is_global_zero:
            self._show("\n\n".join(row["prompt"] + row["completion"] for row in rows) + "\n")

    def _show(self, text: str) -> None:
        """Shows the texts; the output is written, so a reader that left, as `head` does, changes nothing."""
        if isinstance(self.stream, io.TextIOWrapper):
            self.stream.reconfigure(errors="replace")  # of characters that the terminal does not have
        try:
            self.stream.write(for_readers(text, self.stream))
            self.stream.flush()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                _log.info(f"the texts cannot be shown ({error.strerror}); they are in {self.output}")
            if self.stream is sys.stdout:
                # Python would try what is still buffered again, and complain, at its end.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._journal is not None and trainer.is_global_zero and self._rows:
            _log.info("what was finished is kept: the same command goes on with the rest")

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes the rows, all or none, also if the machine crashes."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_file(self.output) as file:
                for row in rows:
                    line = {key: value for key, value in row.items() if key != "index"}
                    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.output)) from error
