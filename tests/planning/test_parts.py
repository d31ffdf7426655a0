"""What one of two peers holds, keeps and sends is what a plan says, counted in a group that only it is in."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpt_lightning.parallel import collectives
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.plan import parallelize, styles_of
from gpt_lightning.planning.activations import kept_activations, total_bytes
from gpt_lightning.planning.parameters import count_parameters
from gpt_lightning.planning.setup import Setup
from gpt_lightning.planning.traffic import traffic_of
from gpt_lightning.training.module import GPTLightningModule
from tests.distributed import run_ranks
from tests.planning.kept import bytes_kept
from tests.planning.test_activations import GPT2, MODERN


class Sent:
    """Adds up what a ring sends of the large messages, and lets each be as it is."""

    def __init__(self, least: int, size: int) -> None:
        self.n_bytes, self._least, self._share = 0.0, least, (size - 1) / size

    def all_reduce(self, x: torch.Tensor, *args: Any, **options: Any) -> Any:
        return self._add(x, 2, options)

    def gather(self, whole: torch.Tensor, x: torch.Tensor, **options: Any) -> Any:
        return self._add(whole.zero_(), 1, options)

    def scatter(self, own: torch.Tensor, x: torch.Tensor, **options: Any) -> Any:
        own.zero_()
        return self._add(x, 1, options)

    def _add(self, x: torch.Tensor, halves: int, options: dict[str, Any]) -> Any:
        if x.numel() >= self._least:
            self.n_bytes += halves * self._share * x.numel() * x.element_size()
        return type("Done", (), {"wait": lambda self: None})() if options.get("async_op") else None


def counted(setup: Setup) -> dict[str, float]:
    """Of the first of the peers: parameters, bytes kept, bytes sent in a pass."""
    size = setup.tensor_parallel_size
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    mesh = ParallelMesh("cpu", size, size)
    torch.manual_seed(0)
    module = GPTLightningModule(setup.config, activation_checkpointing=setup.activation_checkpointing)
    parallelize(module, styles_of(module, size), mesh, cuts_sequence=setup.cuts_sequence)
    model, mesh.cuts_sequence = module.model, setup.cuts_sequence
    ids = torch.randint(setup.config.vocab_size, (setup.batch_size, setup.seq_len))
    with pytest.MonkeyPatch.context() as patch:
        sent = Sent(setup.pass_tokens * setup.config.d_model, size)
        patch.setattr(dist, "all_reduce", sent.all_reduce)
        patch.setattr(collectives, "_all_gather", sent.gather)
        patch.setattr(collectives, "_reduce_scatter", sent.scatter)
        bf16 = setup.precision == "bf16-mixed"
        kept = bytes_kept(model, model.blocks, lambda: model.hidden_states(ids), bf16=bf16)
        sent.n_bytes = 0.0
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = model(ids, ids, reduction="sum").loss
        loss.backward()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "kept": kept, "sent": sent.n_bytes}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_a_peer_holds_keeps_and_sends_what_is_planned(
    config: Any, precision: str, sequence_parallel: bool, checkpointing: bool
) -> None:
    setup = Setup(
        replace(config, vocab_size=998),
        seq_len=96,
        batch_size=3,
        precision=precision,
        devices=2,
        tensor_parallel_size=2,
        sequence_parallel=sequence_parallel,
        activation_checkpointing=checkpointing,
        on_cpu=True,
    )
    (found,) = run_ranks(counted, 1, setup)
    assert found["parameters"] == count_parameters(setup.part).total
    assert found["kept"] == total_bytes(kept_activations(setup), setup)
    assert found["sent"] == traffic_of(setup).peers
