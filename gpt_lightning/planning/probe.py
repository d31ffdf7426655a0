"""Times the parts of a step on this machine for about two seconds: a block, the rest, the optimizer."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpt_lightning.kernels.attention import Attend
from gpt_lightning.kernels.device import keep_freed_memory
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.meta import Uninitialized
from gpt_lightning.planning.setup import Setup
from gpt_lightning.training.optim import OptimizerConfig, build_optimizer

SECONDS_A_PART = 0.5
_LONGEST = 0.3  # seconds of a block's pass, beyond which fewer tokens stand for all
_FEWEST = 64  # tokens


class Probe(NamedTuple):
    """Holds seconds: of a micro-batch's forward and backward pass, and of the optimizer's step."""

    a_pass: float
    optimizer: float


def probe(setup: Setup, device: torch.device) -> Probe:
    """Measures with the threads that each of several processes on a CPU has."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(max(1, threads // setup.devices))
        keep_freed_memory()
    try:
        return _measured(setup, device)
    finally:
        torch.set_num_threads(threads)


def _measured(setup: Setup, device: torch.device) -> Probe:
    config = replace(setup.part, n_layers=1)
    with Uninitialized(), torch.device("meta"):
        model = GPTModel(config)
    model = model.to_empty(device=device).to(_dtype(setup.weight_bytes)).train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    layers = setup.config.n_layers
    block, ids = _sample(setup, model, device)
    share = ids.numel() / setup.pass_tokens
    block_seconds = _least(block.run, device)
    of_block = _optimizer_seconds(setup, model.blocks, device) if model.blocks else 0.0
    model.blocks = nn.ModuleList()
    outside = _least(lambda: _pass(setup, model, ids), device)
    of_rest = _optimizer_seconds(setup, model, device)
    return Probe((layers * block_seconds + outside) / share, layers * of_block + of_rest)


class _Block:
    """Runs one block forward and backward, as often as a step computes it."""

    def __init__(self, setup: Setup, model: GPTModel, ids: Tensor) -> None:
        self._setup, self._model, self._block = setup, model, model.blocks[0]
        self._attend = Attend(ids, head_dim=setup.config.head_dim, dropout_p=setup.config.dropout)
        with torch.no_grad(), _precision(setup, ids.device):
            self._x = model.token_embedding(ids)
        self._x = self._x.to(torch.bfloat16) if setup.on_cpu and setup.is_mixed else self._x

    def run(self) -> None:
        x = self._x.detach().requires_grad_()
        with _precision(self._setup, x.device):
            turn = self._model.rotary(self._attend.positions)
            if self._setup.activation_checkpointing:
                with torch.no_grad():
                    self._block(x, self._attend, turn)
            y = self._block(x, self._attend, turn)
        y.backward(x.detach())
        self._block.zero_grad()


def _pass(setup: Setup, model: GPTModel, ids: Tensor) -> None:
    with _precision(setup, ids.device):
        loss = model(ids, ids, reduction="sum").loss
    loss.backward()
    model.zero_grad()


def _optimizer_seconds(setup: Setup, parameters: nn.Module, device: torch.device) -> float:
    """Times clipping, a step and what follows it."""
    holder = nn.Module()
    holder.blocks = parameters if isinstance(parameters, nn.ModuleList) else nn.ModuleList()
    holder.rest = nn.ModuleList() if isinstance(parameters, nn.ModuleList) else parameters
    if not any(True for _ in holder.parameters()):
        return 0.0
    name = setup.optimizer if len(holder.blocks) else "adamw"
    optimizer = build_optimizer(holder, OptimizerConfig(name=name))

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(holder.parameters(), 1.0)
        optimizer.step()

    for parameter in holder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return _least(step, device)


def _sample(setup: Setup, model: GPTModel, device: torch.device) -> tuple[_Block, Tensor]:
    """Returns a block and the tokens to time it with: all of a pass, or as many as it can do in the time."""
    n_tokens = min(setup.pass_tokens, _FEWEST)
    while True:
        seq_len = min(setup.seq_len, n_tokens)
        ids = torch.randint(model.config.vocab_size, (n_tokens // seq_len, seq_len), device=device)
        block = _Block(setup, model, ids)
        block.run()
        took = _seconds(block.run, device)
        if n_tokens == setup.pass_tokens or 2 * took > _LONGEST:
            return block, ids
        n_tokens = min(setup.pass_tokens, n_tokens * max(2, int(_LONGEST / 2 / took)))


def _least(call: Callable[[], None], device: torch.device) -> float:
    """Returns the least of as many calls as there is time for: other programs may hold some of them up."""
    call()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < SECONDS_A_PART:
        seconds.append(_seconds(call, device))
    return min(seconds)


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    torch.get_device_module(device).synchronize()
    begin = time.perf_counter()
    call()
    torch.get_device_module(device).synchronize()
    return time.perf_counter() - begin


def _precision(setup: Setup, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, _dtype(setup.compute_bytes), enabled=setup.is_mixed)


def _dtype(item_size: int) -> torch.dtype:
    return {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[item_size]
