"""Where predictions go: one JSON line a prompt in prompt order, and the texts for people to read."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class PredictionWriter(Callback):
    """Gathers the predictions of all ranks and writes each prompt's once: `output` and the text `stream`."""

    def __init__(self, output: Path, stream: TextIO) -> None:
        self.output = output
        self.stream = stream
        self._rows: list[dict[str, Any]] = []

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._rows.extend(outputs)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parts: list[list[dict[str, Any]]] = [self._rows]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, self._rows)
        if trainer.is_global_zero:
            by_index = {row["index"]: row for part in parts for row in part}
            self._write([by_index[index] for index in sorted(by_index)])

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.output.with_name(f".{self.output.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                line = {key: value for key, value in row.items() if key != "index"}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(temporary, self.output)
        texts = [row["prompt"] + row["completion"] for row in rows]
        self.stream.write("\n\n".join(texts) + "\n")
        self.stream.flush()
