"""On a GPU the host waits at logging steps alone, and no operation mixes devices: seen on a pretended one.

Not reached: FlexAttention's kernels and compiled blocks, which Triton makes for a true device; several ranks.
"""

import json
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths
from torch.utils.data import DataLoader

from gpt_lightning.callbacks.finite_guard import FiniteGuard
from gpt_lightning.callbacks.orderly_stop import OrderlyStop
from gpt_lightning.callbacks.throughput import Throughput
from gpt_lightning.data.loader import TokenBatch
from gpt_lightning.generation.engine import Engine, Request
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.kernels import attention
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.training import optim
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.optim import OptimizerConfig
from gpt_lightning.training.step_flags import STEPS_LATER, Readout
from gpt_lightning.training.trainer import GPTTrainer, is_logging_step
from tests.pretended_cuda import PretendedCuda, PretendedStrategy, pretended_cuda

pytestmark = pytest.mark.slow
B, T, V = 3, 130, 301
STEPS, LOGGED = 4, 3
Part = Callable[[PretendedCuda], list[str]]  # returns where the host waits that it should not


class Waits(Callback):
    """Is the last callback, and notes where the host waits between the ends of batches."""

    def __init__(self, device: PretendedCuda) -> None:
        self.device, self.step, self.n_before = device, 0, 0
        self.found: list[str] = []  # but in logging steps
        self.n_logged = 0

    def on_train_start(self, *_: Any) -> None:
        self.n_before = len(self.device.waits)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        waits = self.device.waits[self.n_before :]
        former, self.step, self.n_before = self.step, trainer.global_step, len(self.device.waits)
        if self.step != former and is_logging_step(trainer, self.step):
            self.n_logged += len(waits)
        else:
            self.found += waits


class Reading(GPTLightningModule):
    """Reads each loss, as nobody should."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        assert loss.item() == 0
        return loss


def train(
    device: PretendedCuda, kind: type[GPTLightningModule] = GPTLightningModule, name: str = "adamw"
) -> list[str]:
    with torch.device("cuda"):
        config = GPTConfig(V, T, n_layers=1, n_heads=4, d_model=64, dropout=0.1)
        module = kind(config, OptimizerConfig(name=name), compile_backend="none")
    ids = torch.randint(V, (B, T))
    documents = torch.arange(T).expand(B, T) // 50 if name == "muon" else None
    batch = TokenBatch(ids, ids, documents, torch.arange(B), 2 * B * T)
    waits = Waits(device)
    trainer = GPTTrainer(
        strategy=PretendedStrategy(),
        plugins=MixedPrecision("bf16-mixed", "cuda"),
        max_steps=STEPS,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        log_every_n_steps=LOGGED,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FiniteGuard(), OrderlyStop(), Throughput(), waits],
    )
    trainer.fit(module, DataLoader([batch] * 2 * STEPS, batch_size=None))  # type: ignore[arg-type]
    assert trainer.global_step == STEPS and waits.n_logged > 0
    return waits.found


def flex_mask(device: PretendedCuda) -> list[str]:
    positions = attention.document_positions(torch.arange(T, device="cuda").expand(B, T) // 50)
    assert attention.block_mask(positions).kv_indices.device.type == "cuda"
    return device.waits


def flags(device: PretendedCuda) -> list[str]:
    readout, flag = Readout(), torch.zeros((), device="cuda")
    assert [readout(flag) for _ in range(STEPS_LATER + 3)] == [0] * (STEPS_LATER + 3)
    return device.waits


def generate(device: PretendedCuda) -> list[str]:
    """Reads what was chosen once a step; the short copies to the device before that are not looked at."""
    with torch.device("cuda"):
        model = GPTModel(GPTConfig(V, T, n_layers=1, n_heads=4, d_model=64))
    settings = GenerationConfig(max_new_tokens=4, temperature=0.8, top_k=7, top_p=0.9, min_p=0.01)
    engine = Engine(model, settings, eos_token_id=None, batch_size=2)
    done = engine.complete([Request([1, 2, 3], 0), Request([4, 5], 1), Request([6], 2)])
    assert [len(each.token_ids) for each in done] == [4, 4, 4]
    reads = [wait for wait in device.waits if "_to_copy" not in wait]
    n_numbers = 3 * 4 * 3  # of 3 texts, for each of 4 tokens; `tolist` reads fake ones number by number
    assert reads.count("aten._local_scalar_dense.default in engine.py:_choose") == n_numbers
    return [wait for wait in reads if not wait.endswith("in engine.py:_choose")]


PARTS: dict[str, Part] = {
    "training by adamw": train,
    "training by muon, packed": partial(train, name="muon"),
    "flex attention's mask": flex_mask,
    "flags": flags,
    "generation": generate,
}


def on_tensor(act: Callable[[Tensor], Any]) -> Part:
    def part(device: PretendedCuda) -> list[str]:
        act(torch.ones(3, device="cuda"))
        return device.waits

    return part


WAITING: dict[str, Part] = {
    "a loss that is read": partial(train, kind=Reading),
    "tolist": on_tensor(lambda x: x.tolist()),
    "a condition": on_tensor(lambda x: bool(x.sum() > 0)),
    "cpu": on_tensor(lambda x: x.cpu()),
    "a tensor of a list": on_tensor(lambda x: torch.tensor([1.0], device="cuda")),
    "a copy to the host": on_tensor(lambda x: torch.ones(3).copy_(x)),
    "a mask": on_tensor(lambda x: x.__setitem__(x > 0, 1.0)),
    "synchronize": on_tensor(lambda x: torch.cuda.synchronize()),
}
MIXING: dict[str, Part] = {"indices of the host": on_tensor(lambda x: x[torch.tensor([0, 1])])}


def run_all() -> dict[str, Any]:
    """Runs in a process of its own: of each part, waits and mixed devices, or an error."""
    setattr(optim, "is_shared", lambda weight: True)  # Muon takes no other than nn.Parameter's own type
    results: dict[str, Any] = {}
    for name, part in (PARTS | WAITING | MIXING).items():
        try:
            with pretended_cuda() as device:
                waits = part(device)
            results[name] = {"waits": waits, "mixed": device.mixed, "calls": device.n_calls}
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no c++ to compile the pretended device with")
    if torch.cuda.is_available():
        pytest.skip("there is a true CUDA device")
    path = tmp_path_factory.mktemp("device") / "pretended_cuda.so"
    folders = [f"-I{each}" for each in include_paths()]
    folders += [option for each in library_paths() for option in (f"-L{each}", f"-Wl,-rpath,{each}")]
    source = str(Path(__file__).with_name("pretended_cuda.cpp"))
    command = [compiler, "-std=c++20", "-shared", "-fPIC", source, "-o", str(path), *folders]
    done = subprocess.run([*command, "-lc10", "-ltorch_cpu"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"c++ cannot compile the pretended device: {done.stderr.strip()[-300:]}")
    code = f"""
import ctypes
ctypes.CDLL({str(path)!r})
import json
from tests.test_pretended_device import run_all
print(json.dumps(run_all()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", PARTS)
def test_the_host_does_not_wait_and_devices_are_not_mixed(name: str, results: dict[str, Any]) -> None:
    assert "error" not in results[name], results[name]["error"]
    assert results[name]["waits"] == results[name]["mixed"] == []
    assert results[name]["calls"] > (1000 if name.startswith("training") else 10)


@pytest.mark.parametrize("name", WAITING)
def test_waits_are_seen(name: str, results: dict[str, Any]) -> None:
    assert "error" not in results[name], results[name]["error"]
    assert results[name]["waits"]


@pytest.mark.parametrize("name", MIXING)
def test_mixed_devices_are_seen(name: str, results: dict[str, Any]) -> None:
    assert "error" not in results[name], results[name]["error"]
    assert results[name]["mixed"]
