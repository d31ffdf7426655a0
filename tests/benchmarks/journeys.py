"""How many functions of ours a reader meets on the way: distinct ones that ran, and the files they lie in.

python tests/benchmarks/journeys.py [--names]    (a minute; works in a folder that it removes)
A mirror, not a goal: nothing is inlined or hidden for it.
"""

import inspect
import io
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from lightning.pytorch import Callback  # noqa: E402

from gpt_lightning.__main__ import main  # noqa: E402

PACKAGE = str(ROOT / "gpt_lightning") + os.sep
TEXT = ("The quick brown fox jumps over the lazy dog. " * 40 + "\n") * 40
MODEL = {"max_position_embeddings": 64, "n_layers": 2, "n_heads": 2, "d_model": 64}
STEPS = 14
CHECKPOINT = "checkpoints/trace/last.ckpt"


class Recorder:
    """Notes the functions of ours that run while it is on, on all threads."""

    def __init__(self) -> None:
        self.journeys: dict[str, set[tuple[str, str]]] = {}
        self._current: set[tuple[str, str]] | None = None

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if self._current is None or event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        is_function = code.co_flags & inspect.CO_OPTIMIZED  # not the body of a module or a class
        if is_function and not code.co_name.startswith("<"):
            self._current.add((code.co_filename.removeprefix(PACKAGE), code.co_qualname))

    def begin(self, name: str) -> None:
        self._current = self.journeys[name] = set()

    def end(self) -> None:
        self._current = None


RECORDER = Recorder()


class Steps(Callback):
    """Records two training steps and a save of a fit."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        RECORDER.end()
        if trainer.global_step == 6:
            RECORDER.begin("a training step")
        elif trainer.global_step == 9:
            RECORDER.begin("a training step that logs")
        elif trainer.global_step == 11:
            RECORDER.begin("a checkpoint save")
            trainer.checkpoint_callback.save_now(trainer)
            RECORDER.end()


def program(verb: str, **options: object) -> None:
    main([verb, *(f"--{name.replace('__', '.')}={value}" for name, value in options.items())])


def fit() -> None:
    Path("text.txt").write_text(TEXT)
    program(
        "fit",
        allow_import="journeys",
        **{"trainer.callbacks+": "journeys.Steps"},
        data__train_files="text.txt",
        data__tokenizer="bytes",
        data__seq_len=64,
        data__batch_size=4,
        **{f"model.config.{name}": value for name, value in MODEL.items()},
        trainer__max_steps=STEPS,
        trainer__val_check_interval=STEPS,
        trainer__gradient_clip_val=1.0,
        trainer__accelerator="cpu",
        samples__prompts="[]",
        run_name="trace",
    )


def predict() -> None:
    """From the command line until the weights are in the model."""
    load = torch.nn.Module.load_state_dict

    def load_and_end(*args: Any, **options: Any) -> Any:
        result = load(*args, **options)
        RECORDER.end()
        return result

    torch.nn.Module.load_state_dict = load_and_end  # type: ignore[method-assign]
    RECORDER.begin("predict, to the opened model")
    try:
        program("predict", ckpt_path=CHECKPOINT, data__prompts="The", generation__max_new_tokens=3)
    finally:
        torch.nn.Module.load_state_dict = load  # type: ignore[method-assign]


class Pieces(io.StringIO):
    """Records from the fifth piece of text that is written to the sixth."""

    n_pieces = 0

    def write(self, text: str) -> int:
        self.n_pieces += 1
        RECORDER.end()
        if self.n_pieces == 5:
            RECORDER.begin("a generated token")
        return len(text)


def generate() -> None:
    stdout, sys.stdout = sys.stdout, Pieces()
    try:
        program("generate", ckpt_path=CHECKPOINT, prompt="The", generation__max_new_tokens=12)
    finally:
        sys.stdout = stdout


def measure() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        threading.setprofile(RECORDER.profile)
        sys.setprofile(RECORDER.profile)
        output, sys.stdout = sys.stdout, io.StringIO()
        for journey in (fit, predict, generate):
            journey()
        sys.setprofile(None)
        sys.stdout = output
        os.chdir(ROOT)
    print(f"{'':32} functions files")
    for name, functions in RECORDER.journeys.items():
        files = sorted({file for file, _ in functions})
        print(f"{name:32} {len(functions):9} {len(files):5}")
        for file in files if "--names" in sys.argv else ():
            print(f"    {file}: {', '.join(sorted(q for f, q in functions if f == file))}")


if __name__ == "__main__":
    import journeys  # under the name by which the program imports the callbacks

    journeys.measure()
