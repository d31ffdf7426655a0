"""TensorParallelDDPStrategy: Lightning's DDP, in which a replica of the model may span several devices."""

import os
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from gpt_lightning.checkpoint.files import FOLDER_KEY, TRAINED_KEY, WEIGHTS, is_sharded
from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.averages import Access, average_parts, averaging, check_callbacks
from gpt_lightning.parallel.full_layout import FullLayout
from gpt_lightning.parallel.gradients import (
    by_whole_norm,
    check_optimizer,
    gradient_norm,
    reduce_in_bf16,
    register_hook,
    sum_gradients,
)
from gpt_lightning.parallel.mesh import ParallelMesh, check_devices
from gpt_lightning.parallel.options import check_options
from gpt_lightning.parallel.plan import ParallelStyle, check_module, parallelize, partial_gradients, styles_of
from gpt_lightning.parallel.replicas import check_replicas
from gpt_lightning.parallel.shard import sharded_parameters
from gpt_lightning.parallel.sharded_replicas import (
    NONE,
    ShardedReplica,
    check_use,
    shard_size,
    share_out,
    share_out_like,
)

if TYPE_CHECKING:  # slow to import
    from gpt_lightning.parallel.sharded_layout import ShardedLayout


RECORDS = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")  # by which users ask for them


class TensorParallelDDPStrategy(DDPStrategy):
    """Tensor parallelism inside DDP: `devices / tensor_parallel_size` replicas, each cut over its peers.

    The LightningModule's `tensor_parallel_plan()` says how the model is cut. Losses and weights are those of
    one process, and checkpoints are ordinary files, at every number of devices.

    Args:
        tensor_parallel_size: Devices that share one replica of the model; divides the devices of a node.
        sequence_parallel: In training, cut the activations between the parallel layers along the sequence,
            which saves memory; the length must be divisible by tensor_parallel_size.
        save_sharded: Write checkpoints as a folder to which every rank adds its part, for models too large
            for one file; `gpt-lightning consolidate` makes a file of it.
        replica_check_every_n_steps: Compare the parameters that ranks should hold alike, at the start and
            every so many optimizer steps, and stop the run if they differ; 0 for never.
        find_unused_parameters: As in DistributedDataParallel.
        static_graph: As in DistributedDataParallel.
        gradient_as_bucket_view: As in DistributedDataParallel.
        process_group_backend: nccl on GPUs and gloo on CPUs by default.
        timeout: How long a rank waits for the others in a collective operation.
        shard_replicas: What the replicas of a node share out instead of each holding it, by FSDP in DDP's
            place: none; optimizer for gradients, moments and, between steps, parameters; full for parameters
            within a step too, which are then gathered layer by layer.
        reduce_dtype: Sum gradients over the replicas in bf16, which halves that traffic; null for their own.
        bucket_cap_mb: As in DistributedDataParallel.
        ddp_comm_hook: As in DDPStrategy, like all that follow; on CPUs too.
        ddp_comm_state: What the hook is given; the replicas' process group when left out.
        ddp_comm_wrapper: As there.
        start_method: popen, spawn, fork or forkserver.
        parallel_devices: Those of a node, in the Trainer's place.
        cluster_environment: Which tells a process its rank, in the Trainer's place.
        checkpoint_io: Which writes and reads files, in the Trainer's place.
        gather_dtype: Gather the shared weights of a layer's linear layers in bf16, as bf16-mixed rounds them,
            which halves that traffic and spares their rounded copies; null for their own.
    """

    mesh: ParallelMesh  # the process groups of this rank, from setup_distributed on

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
        shard_replicas: Literal["none", "optimizer", "full"] = "none",
        reduce_dtype: Literal["bf16"] | None = None,
        bucket_cap_mb: int | None = None,
        ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_state: Any = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        gather_dtype: Literal["bf16"] | None = None,
    ) -> None:
        super().__init__(
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
            bucket_cap_mb=bucket_cap_mb,
        )
        self.tensor_parallel_size = tensor_parallel_size
        self.shard_replicas = shard_replicas
        self.reduce_dtype, self.gather_dtype = reduce_dtype, gather_dtype
        self.ddp_comm_hook, self.ddp_comm_state = ddp_comm_hook, ddp_comm_state
        self.ddp_comm_wrapper, self.start_method = ddp_comm_wrapper, start_method
        self.sequence_parallel = sequence_parallel and tensor_parallel_size > 1
        self.save_sharded = save_sharded
        self.replica_check_every_n_steps = replica_check_every_n_steps
        self._styles: dict[str, ParallelStyle] = {}
        self._parallelized: LightningModule | None = None
        self._shared_out: ShardedReplica | None = None  # around the module, from its first fit on
        self._optimizer_steps = 0

    # ---- the ranks

    @override
    def set_world_ranks(self) -> None:
        """Refuses settings that cannot work, before Lightning, which calls this, starts a process."""
        check_devices(self.num_processes, self.tensor_parallel_size)
        names = ("tensor_parallel_size", "shard_replicas", "reduce_dtype", "gather_dtype", "ddp_comm_hook")
        own = {name: getattr(self, name) for name in (*names, "start_method", "replica_check_every_n_steps")}
        check_options({**self._ddp_kwargs, **own, "precision": str(self.precision_plugin.precision)})
        if self._layer_sync is not None:
            raise UserError("trainer.sync_batchnorm=true is not for TensorParallelDDPStrategy; remove it")
        super().set_world_ranks()

    @override
    def setup_environment(self) -> None:
        """Readies, at the last moment before Lightning sets up the callbacks, those that average weights."""
        super().setup_environment()
        if self.lightning_module is None:  # called by hand, to start the processes alone
            return
        callbacks = self._module.trainer.callbacks
        check_callbacks(callbacks, save_sharded=self.save_sharded)
        access = Access(self._share_out_alike, self._put_away, self._whole_state, self._load_trained)
        average_parts(callbacks, access)

    @override
    def setup_distributed(self) -> None:
        if self.root_device.type == "cpu" and not any(name in os.environ for name in RECORDS):
            # c10d keeps a record of each of the last 2,000 messages, which lie between the tensors on the
            # heap: what these free cannot be joined, and with tensor parallelism it grows by MiB a step.
            os.environ[RECORDS[0]] = "0"
        super().setup_distributed()
        if not hasattr(self, "mesh"):  # called again by every fit, validate, test and predict
            device_type, size = self.root_device.type, self.tensor_parallel_size
            shards = shard_size(self.shard_replicas, self.world_size // size, self.num_nodes)
            self.mesh = ParallelMesh(device_type, self.world_size, size, self._timeout, shards)
            if "PL_GLOBAL_SEED" not in os.environ:
                # Tensor-parallel peers have to draw alike, also in a run that nobody seeded.
                torch.manual_seed(self.broadcast(torch.initial_seed()))

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Has tensor-parallel peers read the same samples."""
        size = self.tensor_parallel_size
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}

    @override
    def process_dataloader(self, dataloader: object) -> object:
        # By data-parallel rank; right after this, Lightning would seed the workers by global rank.
        if int(os.environ.get("PL_SEED_WORKERS", 0)) and getattr(dataloader, "worker_init_fn", "") is None:
            seed_worker = partial(pl_worker_init_function, rank=self.distributed_sampler_kwargs["rank"])
            setattr(dataloader, "worker_init_fn", seed_worker)
        return dataloader

    # ---- the model

    @override
    def connect(self, model: LightningModule) -> None:
        self.check(model)
        super().connect(model)

    def check(self, module: LightningModule) -> None:
        """Raises UserError for a module or a plan that cannot work, before any process waits for another."""
        shares = self.shard_replicas != NONE
        check_module(module, sequence_parallel=self.sequence_parallel, shard_replicas=shares)
        # The hook configure_model builds the layers that the plan names.
        if module is not self._parallelized and not is_overridden("configure_model", module):
            styles_of(module, self.tensor_parallel_size)

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @override
    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Builds models, with `empty_init`, on the meta device, for `setup` to draw this rank's parts."""
        with torch.device("meta") if empty_init else super().tensor_init_context(empty_init):
            yield

    @override
    def setup(self, trainer: Trainer) -> None:
        """Does what DDPStrategy does, and cuts the model before it is moved, wrapped and optimized."""
        # Not super().setup: before an evaluation it gives all ranks rank 0's weights, which are parts here.
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self._parallelize()
        fits = trainer.state.fn == TrainerFn.FITTING
        averages = averaging(trainer.callbacks) if fits else []
        for callback in averages:
            callback.begin(self._module)
        if self._shared_out is None:
            self.model = self.precision_plugin.convert_module(self._module)
            self._check_replicas("at the start")
            if fits and self.mesh.shard_size > 1:
                dtypes = {"reduce_dtype": self.reduce_dtype, "gather_dtype": self.gather_dtype}
                self._shared_out = share_out(self._module, self.mesh, self.shard_replicas, **dtypes)
        if self._shared_out is not None:
            check_use(trainer.state.fn, self.shard_replicas)
            self.model = self._shared_out
            self.model_to_device()
            self._module.to(self.root_device)  # tells it where it is
        else:
            self.model_to_device()
        for callback in averages:
            callback.share_out(self.root_device)
        self.precision_plugin = by_whole_norm(self.precision_plugin, self.mesh, self.gradient_norm)
        self._reduce_metrics_over(self.mesh.dp_group)
        if fits:
            if self._shared_out is None and self.mesh.dp_size > 1:
                # Gradients are averaged over the ranks that hold the same parts.
                self._ddp_kwargs["process_group"] = self.mesh.dp_group
                self.configure_ddp()
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                check_optimizer(optimizer, sharded_parameters(self._module))
        self.setup_precision_plugin()

    @override
    def configure_ddp(self) -> None:
        """Registers the hook here, for CPUs too, and has it reduce over the replicas, not over all ranks."""
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        hook = reduce_in_bf16 if self.reduce_dtype else self.ddp_comm_hook
        register_hook(self.model, self.mesh.dp_group, hook, self.ddp_comm_state, self.ddp_comm_wrapper)

    def _parallelize(self, *, draw: bool = True) -> None:
        """Cuts the model at the first call: when its weights are restored, or else in `setup`."""
        module = self._module
        if module is self._parallelized:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed())))
            self._styles = styles_of(module, self.tensor_parallel_size)
            cuts_sequence = self.sequence_parallel
            parallelize(module, self._styles, self.mesh, cuts_sequence=cuts_sequence, draw=draw)
        self._parallelized, self._shared_out = module, None

    @contextmanager
    def gathered(self) -> Generator[None, None, None]:
        """Has all ranks' models whole inside, for passes that are not the strategy's steps."""
        if self._shared_out is None:
            yield
            return
        # Weights that are gathered rounded multiply rounded activations alone.
        rounding = self.precision_plugin.forward_context() if self.gather_dtype else nullcontext()
        with rounding, self._shared_out.gathered():
            yield

    def _reduce_metrics_over(self, group: dist.ProcessGroup | None) -> None:
        for module in self._module.modules():
            if isinstance(module, Metric):
                module.process_group = group

    @override
    def teardown(self) -> None:
        module = self.lightning_module
        if module is not None:
            self._reduce_metrics_over(None)  # a process group cannot be copied or saved
            if any(parameter.is_meta for parameter in module.parameters()):
                # An error came before the model had any memory: DDPStrategy could not move it to the host.
                super().connect(None)  # type: ignore[arg-type]
        super().teardown()

    # ---- gradients and steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.mesh.cuts_sequence = self.sequence_parallel
        return super().training_step(*args, **kwargs)

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().backward(*args, **kwargs)
        finally:  # not earlier: the pass may recompute parts of the forward pass
            self.mesh.cuts_sequence = False

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        with super().block_backward_sync() if self._shared_out is None else self._shared_out.no_sync():
            yield

    @override
    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """Steps with summed gradients, and now and then compares the replicas."""
        output = super().optimizer_step(optimizer, partial(self._summed, closure), model, **kwargs)
        self._optimizer_steps += 1
        every = self.replica_check_every_n_steps
        # The first step already shows what drifts at every step.
        if every and (self._optimizer_steps % every == 0 or self._optimizer_steps == 1):
            self._check_replicas(f"after {self._optimizer_steps} optimizer steps")
        return output

    def _summed(self, closure: Callable[[], Any]) -> Any:
        """Runs the closure, and sums over the peers the gradients that it left in parts."""
        loss = closure()
        self.mesh.cuts_sequence = False  # `backward` is not called in a step without a loss
        partial_ones = partial_gradients(self._module, self._styles, cuts_sequence=self.sequence_parallel)
        sum_gradients(partial_ones, self.mesh)
        return loss

    def _check_replicas(self, when: str) -> None:
        if self.replica_check_every_n_steps:
            check_replicas(self._module, self.mesh, when)

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Returns the 2-norm of the whole model's gradient, the same on all ranks."""
        return gradient_norm(parameters, sharded_parameters(self._module), self.mesh)

    # ---- what the ranks tell each other: numbers to their data-parallel group, decisions to all

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

    # ---- checkpoints: saved in the layout that `save_sharded` chooses, loaded from either

    def _layout(self, *, sharded: bool) -> "FullLayout | ShardedLayout":
        self._put_away()
        if sharded:
            from gpt_lightning.parallel.sharded_layout import ShardedLayout  # slow to import

            return ShardedLayout(self._module, self.mesh)
        return FullLayout(self._module, self.mesh, self.checkpoint_io)

    def _put_away(self) -> None:
        if self._shared_out is not None:
            self._shared_out.put_away()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._layout(sharded=self.save_sharded).model_state()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self._layout(sharded=self.save_sharded).optimizer_state(optimizer)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        self._check_replicas("before a checkpoint is written")
        self._layout(sharded=self.save_sharded).save(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: Any = None) -> dict[str, Any]:
        """Reads either layout, and never runs code from the file, whatever `weights_only` says."""
        return self._layout(sharded=is_sharded(Path(checkpoint_path))).read(checkpoint_path)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Cuts the model, since `setup` comes later as a rule, and loads this rank's parts into it."""
        self._parallelize(draw=not strict)  # a strict load overwrites every weight
        self._layout(sharded=FOLDER_KEY in checkpoint).load_model(checkpoint, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self._layout(sharded=FOLDER_KEY in checkpoint).load_optimizers(checkpoint, self.optimizers)

    # ---- a copy of the model that holds averages

    def _share_out_alike(self, averages: nn.Module) -> None:
        if self._shared_out is not None:
            share_out_like(averages, self._module)

    def _whole_state(self, averages: nn.Module) -> dict[str, Any]:
        return FullLayout(averages, self.mesh, self.checkpoint_io).model_state()

    def _load_trained(self, checkpoint: Mapping[str, Any]) -> None:
        self.load_model_state_dict({**checkpoint, WEIGHTS: checkpoint[TRAINED_KEY]})
