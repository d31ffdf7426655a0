"""TensorParallelDDPStrategy: Lightning's DDP, in which a replica of the model may span several devices."""

import os
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.fabric.utilities.optimizer import _optimizer_to_device, _optimizers_to_device
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from gpt_lightning.checkpoint.atomic import remove, set_aside
from gpt_lightning.checkpoint.files import FOLDER_KEY, is_sharded
from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.layers import SequenceParallel
from gpt_lightning.parallel.mesh import ParallelMesh, check_devices
from gpt_lightning.parallel.plan import (
    Cut,
    check_module,
    parallelize,
    partial_gradients,
    plan_of,
    resolve,
)
from gpt_lightning.parallel.precision import adapt_precision, check_optimizer, gradient_norm, sum_gradients
from gpt_lightning.parallel.replicas import check_replicas
from gpt_lightning.parallel.shard import sharded_parameters
from gpt_lightning.parallel.state_dict import (
    cut_optimizer_state,
    cut_state_dict,
    full_optimizer_state,
    full_state_dict,
    read_mapped,
)

_PLAIN_LOAD = TorchCheckpointIO.load_checkpoint


class TensorParallelDDPStrategy(DDPStrategy):
    """Tensor parallelism inside DDP: `devices / tensor_parallel_size` replicas, each cut over its peers.

    The LightningModule's `tensor_parallel_plan()` says how the model is cut. The numbers are those of one
    process, and checkpoints are ordinary files, whatever the sizes.

    Args:
        tensor_parallel_size: Devices that share one replica of the model; divides the devices of a node.
        sequence_parallel: In training, cut what lies between the parallel layers along the sequence: less
            memory for activations; the length must be divisible by tensor_parallel_size.
        save_sharded: Write checkpoints as a folder to which every rank adds its part, for models too large
            for one file; `gpt-lightning consolidate` makes a file of it.
        replica_check_every_n_steps: Compare what ranks should hold alike, at the start and every so many
            optimizer steps, and stop the run if it differs; 0 for never.
        find_unused_parameters: As in DistributedDataParallel.
        static_graph: As in DistributedDataParallel.
        gradient_as_bucket_view: As in DistributedDataParallel.
        process_group_backend: nccl on GPUs and gloo on CPUs by default.
        timeout: How long a rank waits for the others in a collective operation.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        sequence_parallel: bool = False,
        save_sharded: bool = False,
        replica_check_every_n_steps: int = 100,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=timeout,
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
        )
        self.tensor_parallel_size = tensor_parallel_size
        self.sequence_parallel = sequence_parallel and tensor_parallel_size > 1
        self.save_sharded = save_sharded
        self.replica_check_every_n_steps = replica_check_every_n_steps
        self._mesh: ParallelMesh | None = None
        self._cuts: dict[str, Cut] = {}
        self._parallelized: LightningModule | None = None
        self._sequence = SequenceParallel()
        self._optimizer_steps = 0

    # ---- who is who

    @property
    def mesh(self) -> ParallelMesh:
        assert self._mesh is not None, "the process groups do not exist before setup_environment"
        return self._mesh

    @override
    def _configure_launcher(self) -> None:
        # Here the devices are known, and no process has been started.
        check_devices(self.num_processes, self.tensor_parallel_size)
        every = self.replica_check_every_n_steps
        if every < 0:
            raise UserError(f"trainer.strategy.replica_check_every_n_steps={every} is below 0; raise it")
        if self._layer_sync is not None:
            raise UserError("trainer.sync_batchnorm=true is not for TensorParallelDDPStrategy; remove it")
        super()._configure_launcher()

    @override
    def setup_distributed(self) -> None:
        super().setup_distributed()
        if self._mesh is None:  # called again by every fit, validate, test and predict
            size, device_type = self.tensor_parallel_size, self.root_device.type
            self._mesh = ParallelMesh(device_type, self.world_size, size, self._timeout)
            if "PL_GLOBAL_SEED" not in os.environ:
                # Tensor-parallel peers have to draw alike, also in a run that nobody seeded.
                torch.manual_seed(self.broadcast(torch.initial_seed()))

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Tensor-parallel peers read the same samples."""
        size = self.tensor_parallel_size
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}

    @override
    def process_dataloader(self, dataloader: object) -> object:
        # Lightning would seed the workers by global rank right after this.
        _auto_add_worker_init_fn(dataloader, self.distributed_sampler_kwargs["rank"])
        return dataloader

    # ---- the model

    @override
    def connect(self, model: LightningModule) -> None:
        self.check(model)
        super().connect(model)

    def check(self, module: LightningModule) -> None:
        """Raise what is wrong with the module's plan, before any process waits for another."""
        check_module(module, sequence_parallel=self.sequence_parallel)
        if module is not self._parallelized and not is_overridden("configure_model", module):
            self._resolve(module)

    def _resolve(self, module: LightningModule) -> None:
        if self.tensor_parallel_size > 1:
            self._cuts = resolve(module, plan_of(module), self.tensor_parallel_size)

    @override
    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """With `empty_init`, build on the meta device: `setup` draws this rank's parts layer by layer."""
        with torch.device("meta") if empty_init else super().tensor_init_context(empty_init):
            yield

    @override
    def setup(self, trainer: Trainer) -> None:
        """As DDPStrategy does it, with the model cut before it is moved, wrapped and optimized.

        DDPStrategy would also broadcast rank 0's parts to everybody before an evaluation.
        """
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        self._parallelize()
        self.model = self.precision_plugin.convert_module(self.lightning_module)
        self.model_to_device()
        adapt_precision(self.precision_plugin, self._shards(), self.mesh)
        for metric in self._metrics():
            metric.process_group = self.mesh.dp_group
        self._check_replicas("at the start")
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            if self.mesh.dp_size > 1:
                self.configure_ddp()
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                check_optimizer(optimizer, self._shards())
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)

    def _parallelize(self, *, draw: bool = True) -> None:
        """Cut the model, once: when its weights are restored, or else in `setup`."""
        module = self.lightning_module
        assert module is not None
        if module is self._parallelized:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed())))
            if is_overridden("configure_model", module):
                self._resolve(module)  # what the plan names was built by that hook
            sequence = self._sequence if self.sequence_parallel else None
            parallelize(module, self._cuts, self.mesh, sequence, draw=draw)
        self._parallelized = module

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        self._ddp_kwargs["process_group"] = self.mesh.dp_group
        return super()._setup_model(model)

    def _metrics(self) -> list[Metric]:
        assert self.lightning_module is not None
        return [module for module in self.lightning_module.modules() if isinstance(module, Metric)]

    @override
    def teardown(self) -> None:
        module = self.lightning_module
        if module is not None:
            for metric in self._metrics():
                metric.process_group = None  # which nobody could copy or save
            if any(parameter.is_meta for parameter in module.parameters()):
                # An error came before the model had any memory: there is nothing to move to the host.
                self._lightning_module = self.model = None
        super().teardown()

    # ---- gradients and steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._sequence.on = self.sequence_parallel
        return super().training_step(*args, **kwargs)

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().backward(*args, **kwargs)
        finally:
            # Not earlier: the backward pass may recompute parts of the forward pass.
            self._sequence.on = False

    @override
    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        output = super().optimizer_step(optimizer, partial(self._close, closure), model, **kwargs)
        self._optimizer_steps += 1
        every = self.replica_check_every_n_steps
        # The first step already shows what drifts at every step.
        if every and (self._optimizer_steps % every == 0 or self._optimizer_steps == 1):
            self._check_replicas(f"after {self._optimizer_steps} optimizer steps")
        return output

    def _close(self, closure: Callable[[], Any]) -> Any:
        """The backward passes, and then the sums that sequence parallelism leaves to be taken once a step."""
        loss = closure()
        self._sequence.on = False  # also where a step without a loss had no backward pass
        if self.sequence_parallel and self.lightning_module is not None:
            parameters = partial_gradients(self.lightning_module, self._cuts)
            sum_gradients([p.grad for p in parameters if p.grad is not None], self.mesh)
        return loss

    def _check_replicas(self, when: str) -> None:
        assert self.lightning_module is not None
        if self.replica_check_every_n_steps:
            check_replicas(self.lightning_module, self.mesh, when)

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The 2-norm of the whole model's gradient, the same on all ranks."""
        return gradient_norm(parameters, self._shards(), self.mesh)

    def _shards(self) -> dict[nn.Parameter, Any]:
        assert self.lightning_module is not None
        return sharded_parameters(self.lightning_module)

    # ---- what is told between ranks: samples by data-parallel rank, decisions by all

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return super().reduce(tensor, group or self.mesh.dp_group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return super().all_gather(tensor, group or self.mesh.dp_group, sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return int(votes) == self.world_size if all else bool(votes)

    # ---- checkpoints; what only sharded ones need is slow to import, and imported when one is met

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        if self.save_sharded:
            from gpt_lightning.parallel.sharded_checkpoint import sharded_state_dict

            return sharded_state_dict(self.lightning_module, self.mesh)
        return full_state_dict(self.lightning_module, self.mesh) if self.mesh.dp_rank == 0 else {}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning wraps it
        if self.save_sharded:
            from gpt_lightning.parallel.sharded_checkpoint import sharded_optimizer_state

            return sharded_optimizer_state(optimizer, self._shards(), self.mesh)
        return full_optimizer_state(optimizer, self._shards(), self.mesh) if self.mesh.dp_rank == 0 else {}

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        self._check_replicas("before a checkpoint is written")
        if self.save_sharded:
            from gpt_lightning.parallel.sharded_checkpoint import save

            save(checkpoint, Path(self.broadcast(str(filepath))))
        elif self.is_global_zero:
            # A plugin that takes options may only begin to write, and makes way itself when it does.
            waits = storage_options is None
            with set_aside(Path(filepath)) if waits and is_sharded(Path(filepath)) else nullcontext():
                super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        if self.is_global_zero and Path(filepath).is_dir():
            remove(Path(filepath))
        else:
            super().remove_checkpoint(filepath)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Never runs what a stranger may have put into the file, whatever `weights_only` says."""
        if is_sharded(Path(checkpoint_path)):
            from gpt_lightning.parallel.sharded_checkpoint import read_rest_together

            return read_rest_together(Path(checkpoint_path))
        if Path(checkpoint_path).is_file() and type(self.checkpoint_io).load_checkpoint is _PLAIN_LOAD:
            return read_mapped(Path(checkpoint_path))
        return super().load_checkpoint(checkpoint_path, weights_only=True)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Before `setup` as a rule: the model is cut first and takes its parts of the file's tensors."""
        assert self.lightning_module is not None
        self._parallelize(draw=not strict)  # a strict load leaves no weight as it was
        folder = checkpoint.get(FOLDER_KEY)
        if folder is not None:
            from gpt_lightning.parallel.sharded_checkpoint import load_weights

            load_weights(Path(folder), self.lightning_module, self.mesh, strict=strict)
            return
        own = cut_state_dict(checkpoint["state_dict"], self.lightning_module)
        self.lightning_module.load_state_dict(own, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        folder = checkpoint.get(FOLDER_KEY)
        for number, (optimizer, saved) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"])):
            if folder is not None:
                from gpt_lightning.parallel.sharded_checkpoint import load_optimizer_state

                state = load_optimizer_state(
                    Path(folder), number, optimizer, saved, self._shards(), self.mesh
                )
            else:
                state = cut_optimizer_state(saved, optimizer, self._shards())
            optimizer.load_state_dict(state)
            _optimizer_to_device(optimizer, self.root_device)
