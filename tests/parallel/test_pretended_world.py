"""What one rank does costs the same in a world of 4,096 as in one of 8, and it sends what docs/ say."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from gpt_lightning.callbacks import throughput
from gpt_lightning.callbacks.exact_resume import ExactResume
from gpt_lightning.callbacks.finite_guard import FiniteGuard
from gpt_lightning.callbacks.orderly_stop import OrderlyStop
from gpt_lightning.callbacks.rank_guard import RankGuard
from gpt_lightning.callbacks.throughput import Throughput
from gpt_lightning.parallel.shard import sharded_parameters
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.trainer import GPTTrainer
from tests.conftest import write_corpus
from tests.parallel.pretended import RANKS_A_NODE, Messages, Sent, arrived, as_rank, peak_memory
from tests.parallel.runs import Run, build

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"
T, STEPS, ACCUMULATE = 8, 4, 2
SETTINGS = Run(seq_len=T, data={"tokenizer": "bytes"}, config={"d_model": 32, "d_ff": 48})


class Cost(NamedTuple):
    seconds: float
    bytes_grown: int


class Strategy(TensorParallelDDPStrategy):
    """Hands DDP's buckets to the fake backend in a way that it knows."""

    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, torch.nn.parallel.DistributedDataParallel)
        self.model.register_comm_hook(self.mesh.dp_group, arrived)


class Watching(pl.Callback):
    """Takes down what is sent in each micro-batch, and checks how the checkpoint was cut."""

    def __init__(self, messages: Messages, checkpoint: dict[str, Any]) -> None:
        self.messages, self.checkpoint = messages, checkpoint
        self.sent: list[Sent] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        check_cut(trainer, pl_module, self.checkpoint)
        self.messages.taken()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.sent.append(self.messages.taken())


def check_cut(trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
    """Compares weights and moments with what torch.chunk makes of the whole ones."""
    strategy = trainer.strategy
    size, peer = strategy.tensor_parallel_size, dist.get_rank() % strategy.tensor_parallel_size
    cut, moments = sharded_parameters(module), trainer.optimizers[0].state
    saved = checkpoint["optimizer_states"][0]["state"]
    parameters = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    numbers = {parameter: number for number, parameter in enumerate(parameters)}
    assert len(cut) > 0 or size == 1
    for name, own in module.named_parameters():
        wholes = checkpoint["state_dict"][name], saved[numbers[own]]["exp_avg"]
        for whole, part in zip(wholes, (own, moments[own]["exp_avg"])):
            expected = whole.chunk(size, cut[own].dim)[peer] if own in cut else whole
            assert torch.equal(part.detach(), expected), name


def trainer_of(folder: Path, callbacks: list[pl.Callback], **options: Any) -> GPTTrainer:
    return GPTTrainer(
        accelerator="cpu",
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=1.0,
        log_every_n_steps=2,
        limit_val_batches=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def make(corpus: Path) -> tuple[GPTLightningModule, Any]:
    like, datamodule = build(corpus, SETTINGS)
    datamodule.batch_size = 1
    return GPTLightningModule(like.model.config, like.optimizer, like.schedule), datamodule


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text for five steps of 4,096 ranks, and beside it a checkpoint of one, step 1."""
    path = write_corpus(tmp_path_factory.mktemp("world") / "corpus.jsonl")
    path.write_text(40 * path.read_text())
    trainer = trainer_of(path.parent, [], max_steps=1)
    trainer.fit(*make(path))
    trainer.save_checkpoint(path.with_name("one.ckpt"))
    return path


def train(corpus: Path, tp: int, cuts_sequence: bool) -> tuple[Cost, list[Sent], dict[str, int]]:
    """Runs in a rank: goes on with the checkpoint for STEPS steps, and makes one of its own."""
    setattr(throughput, "LOOKS", 1)  # at a CPU's peak, for which all ranks wait
    begun, messages = time.process_time(), Messages()
    with peak_memory() as grown, messages:
        path, guard = corpus.with_name("one.ckpt"), RankGuard()
        watching = Watching(messages, torch.load(path, weights_only=False))
        module, datamodule = make(corpus)
        trainer = trainer_of(
            corpus.parent,
            [guard, FiniteGuard(), Throughput(), ExactResume(), OrderlyStop(), watching],
            strategy=Strategy(tp, cuts_sequence, replica_check_every_n_steps=0),
            devices=RANKS_A_NODE,
            num_nodes=dist.get_world_size() // RANKS_A_NODE,
            max_steps=1 + STEPS,
        )
        trainer.fit(module, datamodule, ckpt_path=path, weights_only=False)
        trainer._checkpoint_connector.dump_checkpoint()
    seconds = time.process_time() - begun
    cut = sharded_parameters(module)
    sizes = {"P": sum(p.numel() for p in module.parameters())}
    sizes["S"] = sum(p.numel() for p in module.parameters() if p not in cut)
    return Cost(seconds, grown[0]), watching.sent, sizes


@pytest.fixture(scope="module")
def cost_among_8(corpus: Path) -> Cost:
    costs = [as_rank(rank, 8, train, corpus, 2, False)[0] for rank in (0, 5)]
    return Cost(*map(min, zip(*costs)))


@pytest.mark.parametrize(
    "rank, world_size", [(0, 64), (63, 64), (0, 1024), (1023, 1024), (0, 4096), (77, 4096)]
)
def test_a_rank_costs_the_same_in_any_world(
    rank: int, world_size: int, corpus: Path, cost_among_8: Cost, capsys: pytest.CaptureFixture[str]
) -> None:
    cost, sent, sizes = as_rank(rank, world_size, train, corpus, 2, False)
    told = [f"{each.seconds:.2f} s, {each.bytes_grown / 2**20:.0f} MiB" for each in (cost, cost_among_8)]
    with capsys.disabled():
        print(f"\nrank {rank} of {world_size}: {told[0]}; of 8: {told[1]}")
    assert cost.seconds < 2 * cost_among_8.seconds
    assert cost.bytes_grown < 2 * cost_among_8.bytes_grown
    assert_sent(sent, sizes, world_size, tp=2, cuts_sequence=False)


@pytest.mark.parametrize("tp, cuts_sequence", [(1, False), (4, False), (4, True)])
def test_a_rank_sends_what_the_page_says(tp: int, cuts_sequence: bool, corpus: Path) -> None:
    for rank, world_size in ((0, 8), (1023, 1024)):
        _, sent, sizes = as_rank(rank, world_size, train, corpus, tp, cuts_sequence)
        assert_sent(sent, sizes, world_size, tp=tp, cuts_sequence=cuts_sequence)


def assert_sent(
    sent: list[Sent], sizes: dict[str, int], world_size: int, *, tp: int, cuts_sequence: bool
) -> None:
    """Compares each micro-batch's messages with the page's."""
    letters = {"L": 2, "B": 1, "T": T, "D": 32, "e": 4, **sizes}
    groups = {"peers": tp, "replicas": world_size // tp, "all ranks": world_size}
    assert len(sent) == STEPS * ACCUMULATE
    for number, found in enumerate(sent, start=1):
        step = 1 + number // ACCUMULATE  # the checkpoint's was 1
        times = ["micro-batch" + ", sequence_parallel" * cuts_sequence]
        if number % ACCUMULATE == 0:
            times += ["step"] + ["step, sequence_parallel"] * cuts_sequence
            times += ["logging step"] * (step % 2 == 0)
        expected: dict[tuple[str, int], list[int]] = {}
        for when, among, operation, messages, n_bytes in page():
            # Without peers a norm is reduced all the same, over the rank alone.
            if when in times and (groups[among] > 1 or "norm" in operation):
                total = expected.setdefault((operation.partition(",")[0], groups[among]), [0, 0])
                total[0] += eval(messages, {}, letters)
                total[1] += eval(n_bytes, {}, letters)
        assert summed(found) == expected, f"micro-batch {number}"


def summed(sent: Sent) -> dict[tuple[str, int], list[int]]:
    """How many messages, and bytes, by operation and number of ranks; what DDP tells itself once apart."""
    totals: dict[tuple[str, int], list[int]] = {}
    for (operation, ranks, n_bytes), count in sent.items():
        if operation != "broadcast":  # of its buckets, after the first backward pass
            total = totals.setdefault((operation, ranks), [0, 0])
            total[0] += count
            total[1] += count * n_bytes
    return totals


def page() -> list[list[str]]:
    table = PAGE.read_text().partition("| in each |")[2].partition("\n\n")[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) == 11 and all(len(row) == 5 for row in rows)
    return rows
