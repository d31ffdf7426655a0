"""What a run did, written down step by step: the sample ids, the loss's bits and the learning rate."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class Trace(Callback):
    """Appends a line a micro-batch and a line a validation to `<path>.<rank>`, each in one write.

    A killed run leaves whole lines; a resumed one appends its own.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def _write(self, trainer: Any, row: dict[str, Any]) -> None:
        descriptor = os.open(f"{self.path}.{trainer.global_rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (json.dumps(row) + "\n").encode())
        os.close(descriptor)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        total = trainer.fit_loop.epoch_loop.batch_progress.total
        self._write(
            trainer,
            {
                "at": f"batch {total.ready}",
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "samples": batch.sample_ids.tolist(),
                "text": hashlib.sha256(batch.targets.numpy().tobytes()).hexdigest()[:16],
                "loss": float(outputs["loss"]).hex(),
                "lr": trainer.optimizers[0].param_groups[0]["lr"].hex(),
            },
        )

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            loss = float(trainer.callback_metrics["val/loss"]).hex()
            self._write(trainer, {"at": f"validation {trainer.global_step}", "loss": loss})

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._write(trainer, {"at": f"epoch end {trainer.current_epoch}", "step": trainer.global_step})


def read_trace(path: Path, rank: int = 0) -> list[dict[str, Any]]:
    file = Path(f"{path}.{rank}")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def differences(path: Path, whole: Path, rank: int = 0) -> list[str]:
    """How a killed and resumed run's trace differs from that of the run that was never killed.

    Steps between the last checkpoint and a kill are done twice; both times must be as in the whole run.
    """
    expected = {row["at"]: row for row in read_trace(whole, rank)}
    found = read_trace(path, rank)
    wrong = [f"{row} instead of {expected.get(row['at'])}" for row in found if row != expected.get(row["at"])]
    missing = expected.keys() - {row["at"] for row in found}
    return wrong + [f"{at} is missing" for at in sorted(missing)]
