"""What gpu.py measures, part by part; each part yields its cases, as a name and what measures it."""

import json
import os
import re
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from gpu_training import (
    FULL,
    ROOT,
    TOY,
    Scale,
    fresh_memory,
    largest_that_fits,
    recipe,
    tell,
    train_for,
    train_nanogpt,
    train_ours,
    train_transformers,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt_lightning.generation.engine import generate
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.kernels.attention import Attend, dense_mask
from gpt_lightning.kernels.packed_linear import packed
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.planning.peak_flops import known_flops, measured_flops
from gpt_lightning.training.optim import OptimizerConfig

Figures = dict[str, Any]
Cases = Iterator[tuple[str, Callable[[], Figures]]]


def limits(scale: Scale, options: Namespace) -> Cases:
    """The rate of large matrix products in bfloat16, which is what every other part is a share of."""

    def measure() -> Figures:
        seconds = 3.0 if scale is FULL else 0.05
        rate = measured_flops(torch.device(scale.device), torch.bfloat16, seconds)
        name = torch.cuda.get_device_name() if scale.device == "cuda" else "CPU"
        return {"flops_per_second": rate, "data_sheet": known_flops(name, "bf16"), "device": name}

    yield "bf16 matmul", measure


def attention(scale: Scale, options: Namespace) -> Cases:
    """Forward and backward pass of one layer by each implementation, as 124M has it."""
    B, H, T, K = (16, 12, 1024, 64) if scale is FULL else (2, 2, 600, 16)
    base = torch.randn(B, T, H, 3, K, device=scale.device, dtype=torch.bfloat16, requires_grad=True)
    ids = _document_ids(B, T, scale.device)
    attend = Attend(ids, ids, head_dim=K, dropout_p=0.0)

    def measure(way: Callable[..., Tensor], backend: SDPBackend | None = None) -> Figures:
        def both_passes() -> None:
            with sdpa_kernel(backend) if backend is not None else nullcontext():
                y = way(*base.permute(3, 0, 2, 1, 4))
            y.backward(torch.ones_like(y))
            base.grad = None

        return {"step_ms": 1e3 * _seconds(both_passes, 20 if scale is FULL else 2, base.device)}

    causal = partial(F.scaled_dot_product_attention, is_causal=True)
    yield "attention", partial(measure, causal)
    if scale.device == "cuda":
        yield "attention, flash", partial(measure, causal, SDPBackend.FLASH_ATTENTION)
        yield "attention, cuDNN", partial(measure, causal, SDPBackend.CUDNN_ATTENTION)
    masked = partial(F.scaled_dot_product_attention, attn_mask=dense_mask(attend.positions))
    yield "attention, documents by dense mask", partial(measure, masked)
    assert not isinstance(attend.mask, Tensor)
    yield "attention, documents", partial(measure, partial(_by_heads, attend))


def checks(scale: Scale, options: Namespace) -> Cases:
    """That attention within documents gives the mask's numbers, and compiled blocks those of plain ones."""
    device = scale.device

    def documents() -> Figures:
        ids = _document_ids(4, 1000 if scale is FULL else 600, device)
        attend = Attend(ids, ids, head_dim=64, dropout_p=0.0)
        shape = (4, 2, ids.shape[1], 64)
        q, k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in range(3))
        assert not isinstance(attend.mask, Tensor)
        actual = _by_heads(attend, q, k, v)
        dense = dense_mask(attend.positions)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
        weights = torch.randn_like(expected)
        pairs = zip(*([y, *torch.autograd.grad((y * weights).sum(), (q, k, v))] for y in (actual, expected)))
        return {"way": type(attend.mask).__name__} | _difference(pairs)

    def compiled(size: str) -> Figures:
        torch.manual_seed(0)
        with torch.device(device):
            model = GPTModel(scale.config(size))
            ids = torch.randint(scale.vocab_size, (2, scale.seq_len))
            document_ids = torch.arange(scale.seq_len).expand_as(ids) // 300
        results = []
        for backend in (None, scale.backend):
            if backend is not None:
                for block in model.blocks:
                    block.compile(backend=backend)
            loss = model(ids, ids, document_ids=document_ids).loss
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        return _difference(zip(*results))

    yield "check of documents", documents
    for size in ("124M", "135M"):
        yield f"check of compiled blocks, {size}", partial(compiled, size)


def _difference(pairs: Iterable[tuple[Tensor, Tensor]], allowed: float = 2e-3) -> Figures:
    error = max(float((actual - expected).norm() / expected.norm()) for actual, expected in pairs)
    if error > allowed:
        raise ValueError(f"differs by {error:.1e} of its norm, {allowed:.0e} is allowed")
    return {"relative_error": error}


def _training(scale: Scale, name: str, train: Callable[[int], Figures]) -> Cases:
    """With the batch that all have, and with one as large as fits."""
    equal, large = scale.batches
    yield f"124M B{equal} {name}", partial(train, equal)
    yield f"124M large {name}", partial(largest_that_fits, [large, large // 2], train)


def ours(scale: Scale, options: Namespace) -> Cases:
    return _training(
        scale, "ours", lambda batch: train_ours(scale, "124M", batch, options.folder, compiled=True)
    )


def nanogpt(scale: Scale, options: Namespace) -> Cases:
    path = options.nanogpt
    if path is None:
        return iter(())
    return _training(
        scale, "nanogpt", lambda batch: train_nanogpt(scale, path, batch, options.folder, compiled=True)
    )


def transformers(scale: Scale, options: Namespace) -> Cases:
    batch = scale.batches[0]
    train = partial(train_transformers, scale, batch, options.folder)
    yield f"124M B{batch} transformers", partial(train, compiled=True)
    yield f"124M B{batch} transformers, not compiled", partial(train, compiled=False)


def ours_not_compiled(scale: Scale, options: Namespace) -> Cases:
    batch = scale.batches[0]
    train = partial(train_ours, scale, "124M", batch, options.folder, compiled=False)
    yield f"124M B{batch} ours, not compiled", train


def documents(scale: Scale, options: Namespace) -> Cases:
    batch = scale.batches[0]
    train = partial(train_ours, scale, "124M", batch, options.folder, document_mask=True)
    yield f"124M B{batch} ours, document mask", partial(train, compiled=True)
    yield f"124M B{batch} ours, document mask, not compiled", partial(train, compiled=False)


def medium(scale: Scale, options: Namespace) -> Cases:
    return _larger(scale, options, "350M", [32, 16], [64, 32])


def xl(scale: Scale, options: Namespace) -> Cases:
    return _larger(scale, options, "1.5B", [8, 4], [16, 8])


def _larger(scale: Scale, options: Namespace, size: str, batches: list[int], more: list[int]) -> Cases:
    """Without recomputation, and with it where it lets `more` in."""

    def train(checkpointing: bool, batch: int) -> Figures:
        return train_ours(
            scale, size, batch, options.folder, compiled=True, activation_checkpointing=checkpointing
        )

    batches, more = (batches, more) if scale is FULL else ([2], [2])
    yield f"{size} ours", partial(largest_that_fits, batches, partial(train, False))
    yield f"{size} ours, activation checkpointing", partial(largest_that_fits, more, partial(train, True))


class SyncCounter(pl.Callback):
    """Where the host waits for the device in ten steps, none of which logs."""

    def __init__(self, first: int) -> None:
        self.first, self.places = first, Counter[str]()
        self._catcher = warnings.catch_warnings(record=True)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.first:
            self._caught = self._catcher.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.first + 10:
            torch.cuda.set_sync_debug_mode("default")
            self._catcher.__exit__(None, None, None)
            found = [each for each in self._caught or [] if "synchronizing" in str(each.message)]
            self.places.update(f"{Path(each.filename).name}:{each.lineno}" for each in found)


def syncs(scale: Scale, options: Namespace) -> Cases:
    def measure(document_mask: bool) -> Figures:
        counter = SyncCounter(scale.warm_up + 5)
        train = partial(train_ours, scale, "124M", scale.batches[0], options.folder, compiled=False)
        train(callbacks=(counter,), log_every=1000, document_mask=document_mask)
        return {"syncs_per_step": counter.places.total() / 10, "places": dict(counter.places)}

    if scale.device == "cuda":
        yield "host waits", partial(measure, False)
        yield "host waits, document mask", partial(measure, True)


def generation(scale: Scale, options: Namespace) -> Cases:
    from transformers import GPT2Config, GPT2LMHeadModel

    from gpt_lightning.huggingface.gpt2 import config_to_gpt2

    n_new, device = 128 if scale is FULL else 8, torch.device(scale.device)
    model = GPTModel(scale.config("124M")).to(device, torch.bfloat16).eval()
    reference = GPT2LMHeadModel(GPT2Config(**config_to_gpt2(model.config))).eval()
    reference.to(device, torch.bfloat16)

    def ours(batch: int, n: int) -> None:
        prompts = torch.randint(scale.vocab_size, (batch, 32)).tolist()
        settings = GenerationConfig(max_new_tokens=n, do_sample=False)
        copy = packed(model, quantize=None, n_rows=batch)
        generate(copy, prompts, settings, eos_token_id=None, batch_size=batch)

    def theirs(batch: int, n: int) -> None:
        ids = torch.randint(scale.vocab_size, (batch, 32), device=device)
        settings = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        reference.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    def measure(run: Callable[[int, int], None], batch: int) -> Figures:
        seconds = _seconds(lambda: run(batch, n_new), 1, device)
        return {"tokens_per_second": batch * n_new / seconds, "step_ms": 1e3 * seconds / n_new}

    for batch in (1, 8):
        yield f"generation B{batch} ours", partial(measure, ours, batch)
        yield f"generation B{batch} transformers", partial(measure, theirs, batch)


def modern(scale: Scale, options: Namespace) -> Cases:
    """Today's block with Muon beside GPT-2's with AdamW: speed, and the loss when both had the same time.

    The text is torch's own source, of which a run sees less than all: each loss is of text that is new to it.
    """
    seconds = 20.0 if scale is FULL else 1.0
    for size, name, optimizer in (
        ("124M", "124M AdamW", OptimizerConfig()),
        ("135M", "135M modern, Muon", OptimizerConfig(**recipe("modern")["optimizer"])),
    ):
        told = partial(_tell_loss, name)
        yield name, partial(train_for, scale, size, optimizer, seconds, options.folder, told)


def _tell_loss(name: str, seconds: float, loss: float) -> None:
    tell(f"{name}, {seconds:g} s", {"loss": loss})


TOY_LUXUN = (
    "--data.tokenizer bytes --data.seq_len 64 --data.batch_size 2 --model.config.max_position_embeddings 64 "
    "--model.config.n_layers 1 --model.config.n_heads 2 --model.config.d_model 16 "
    "--model.schedule.warmup_steps 2 --trainer.max_steps 8 --trainer.val_check_interval 4 "
    "--trainer.limit_val_batches 2 --generation.max_new_tokens 8"
)


def luxun(scale: Scale, options: Namespace) -> Cases:
    """configs/luxun.yaml by the command line: its curve, the best held-out perplexity, what it recites."""
    root = options.folder / "luxun"
    folder = root / "checkpoints" / "luxun"

    def fit() -> Figures:
        source = json.dumps([str(Path(options.luxun).resolve())])
        words = ["--config", str(ROOT / "configs/luxun.yaml"), "--data.train_files", source]
        words += ["--data.cache_dir", str(root / "cache"), "--trainer.default_root_dir", str(root)]
        words += ["--trainer.precision", "bf16-mixed"]
        begin = time.perf_counter()
        for line in _program("fit", *words, *(TOY_LUXUN.split() if scale is TOY else ())):
            if row := re.search(r"\bstep ([\d,]+):.* val/loss", line):
                values = re.findall(r"(val/\w+) ([\d.,]+)", line)
                figures = {name: float(value.replace(",", "")) for name, value in values}
                tell(f"luxun step {row[1]}", {**figures, "seconds": time.perf_counter() - begin})
        seconds = time.perf_counter() - begin
        curve = _scalars(folder, ("val/loss", "val/ppl", "val/bpb"))
        best = min(curve, key=lambda step: curve[step]["val/loss"])
        return {"seconds": seconds, "best_step": best, **curve[best], "curve": curve}

    def recite() -> Figures:
        output = root / "predictions.jsonl"
        prompts = json.dumps(["我", "我要为"], ensure_ascii=False)
        words = ["--ckpt_path", str(folder / "last.ckpt"), "--data.prompts", prompts, "--output", str(output)]
        words += ["--generation.max_new_tokens", "200" if scale is FULL else "8"]
        _ = [*_program("predict", *words)]
        rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        return {row["prompt"]: row["completion"] for row in rows}

    if options.luxun is not None:
        yield "luxun fit", fit
        yield "luxun recites", recite


def _program(*words: str) -> Iterator[str]:
    """Yields the program's lines as they come."""
    command = [sys.executable, "-m", "gpt_lightning", *words]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    last: deque[str] = deque(maxlen=5)
    with subprocess.Popen(command, cwd=ROOT, env=environment, **both) as process:
        for line in process.stdout:
            last.append(line)
            yield line
    if process.returncode:
        raise RuntimeError(f"{words[0]} ended with {process.returncode}: {''.join(last).strip()[-300:]}")


def _scalars(folder: Path, tags: tuple[str, ...]) -> dict[int, dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    curve: dict[int, dict[str, float]] = {}
    for tag in tags:
        for event in events.Scalars(tag):
            curve.setdefault(event.step, {})[tag] = round(event.value, 4)
    return curve


def _document_ids(B: int, T: int, device: str) -> Tensor:
    """Documents of 1 to T tokens, other ones in each row."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(B, T, generator=generator) < 1 / 300).cumsum(1).to(device)


def _by_heads(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of [B, H, T, K] each, as PyTorch's takes it."""
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), 0.0).transpose(1, 2)


def _seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    work()
    torch.get_device_module(device).synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.get_device_module(device).synchronize()
    return (time.perf_counter() - begin) / repeats


PARTS: dict[str, Callable[[Scale, Namespace], Cases]] = {
    "limits": limits,
    "luxun": luxun,
    "ours": ours,
    "nanogpt": nanogpt,
    "modern": modern,
    "checks": checks,
    "350M": medium,
    "1.5B": xl,
    "not_compiled": ours_not_compiled,
    "syncs": syncs,
    "documents": documents,
    "attention": attention,
    "transformers": transformers,
    "generation": generation,
}


def run_part(name: str, options: Namespace) -> None:
    """Tells the cases one by one; what went wrong is a case too."""
    scale = TOY if options.toy else FULL
    warnings.simplefilter("ignore")
    if options.toy:
        torch.set_num_threads(1)
    for case, measure in PARTS[name](scale, options):
        fresh_memory()
        try:
            figures = measure()
        except Exception as error:
            figures = {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        tell(case, figures)
