"""Runs `plan`: reads the words of a fit, and says what that would take, without its text."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from gpt_lightning.callbacks.rank_guard import RankGuard
from gpt_lightning.callbacks.terminal import for_readers
from gpt_lightning.cli.app import GPTLightningCLI
from gpt_lightning.cli.checks import VOCABULARY, check_vocabulary, given_vocabulary
from gpt_lightning.cli.config_file import complete_words
from gpt_lightning.cli.main import VERBS
from gpt_lightning.cli.model_class import model_options
from gpt_lightning.cli.origin import Origin
from gpt_lightning.cli.parser import PARSER_ONLY
from gpt_lightning.cli.trainer_parser import files_in_utf8, limited_imports
from gpt_lightning.data.tokenizer import is_trained_here, load_tokenizer, requested_vocab_size
from gpt_lightning.exit_codes import UserError
from gpt_lightning.huggingface.importing import local_config
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.parallel.options import check_gathering
from gpt_lightning.planning.advice import fits, proposal, remedies
from gpt_lightning.planning.devices import Device, device_named, this_device
from gpt_lightning.planning.memory import memory_of
from gpt_lightning.planning.probe import probe
from gpt_lightning.planning.setup import PRECISIONS, SHARDINGS, Setup
from gpt_lightning.planning.speed import Speed, speed_of
from gpt_lightning.planning.summary import Plan, as_dict, as_text
from gpt_lightning.training.compilation import choose_backend

VOCABULARIES = {"gpt2": 50257, "openai-community/gpt2": 50257}  # of names on the hub that recipes have
MODELS = {"gpt2": GPTConfig(), "openai-community/gpt2": GPTConfig()}
LEAST_OF_A_LAYER = 1e-3  # seconds of a pass, below which a host may be slower than its GPU
SINGLE, REPLICATED = ("auto", "single_device"), ("auto", "ddp", "DDPStrategy", "TensorParallelDDPStrategy")
HELP = {
    "device": "Plan for such devices (h100, a100, ...), not for this machine, which is measured.",
    "nodes": "Machines with trainer.devices each; trainer.num_nodes by default.",
    "shard_replicas": f"What replicas share: {', '.join(SHARDINGS)}.",
    "link_gb": "GB a second that a device sends within a node, one way; the device's own by default.",
    "node_link_gb": "The same between nodes.",
    "price": "Price of a device and hour.",
}


class _Planned(GPTLightningCLI):
    """Settles and checks the options of a fit, of which nothing is made, and this verb's own."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.prog, parser.description = "gpt-lightning plan", VERBS["plan"]
        parser.add_argument("--device", type=str | None, default=None, help=HELP["device"])
        parser.add_argument("--nodes", type=int | None, default=None, help=HELP["nodes"])
        parser.add_argument("--shard_replicas", type=str | None, default=None, help=HELP["shard_replicas"])
        for name in ("link_gb", "node_link_gb", "price"):
            parser.add_argument(f"--{name}", type=float | None, default=None, help=HELP[name])
        parser.add_argument("--json", action="store_true", help="Print the numbers as JSON.")

    @override
    def _link_vocabulary(self, parser: LightningArgumentParser) -> None: ...

    @override
    def _find_origin(self, root: Path) -> Origin:
        """Leaves a model to begin with, which may have to be downloaded, to its own configuration."""
        if self.config.init_from is not None and self.config.ckpt_path is None:
            if not Path(self.config.init_from).is_file():
                return Origin()
        return super()._find_origin(root)

    @override
    def _check_machine(self) -> None: ...

    @override
    def _begin_run(self, settings: Any, root: Path) -> None: ...

    @override
    def instantiate_classes(self) -> None: ...

    def architecture(self) -> GPTConfig:
        """Returns that of the checkpoint or model that the run begins with, or that of the options."""
        settings, checkpoint = self.config, self.origin.checkpoint
        if checkpoint is not None:
            config, source = checkpoint.config, str(self.origin.init_from or checkpoint.path)
        elif settings.init_from is not None:
            source = settings.init_from
            config = MODELS.get(source) or local_config(source, "init_from")
        else:
            size = _vocabulary_of(settings.data.tokenizer) or given_vocabulary(self.given)
            source = f"data.tokenizer={settings.data.tokenizer}"
            if size is None:
                problem = f"{source}: only the text or the network tells how many ids it has"
                raise UserError(f"{problem}; give --{VOCABULARY}, such as 32000")
            config = GPTConfig(**{**model_options(settings, "config"), "vocab_size": size})
        check_vocabulary(self.given, config.vocab_size, source)
        return config


def run_plan(words: list[str]) -> None:
    with ExitStack() as ending, files_in_utf8(), limited_imports(words) as rest:
        if rest == [PARSER_ONLY]:
            _Planned(["fit", PARSER_ONLY], None, RankGuard(), ending)
        planned = _Planned(*complete_words(["fit", *rest]), RankGuard(), ending)
    plan = make_plan(planned.config, planned.architecture())
    text = json.dumps(as_dict(plan), indent=2) if planned.config.json else as_text(plan)
    print(for_readers(text, sys.stdout))


def make_plan(settings: Any, config: GPTConfig) -> Plan:
    setup = setup_of(settings, config, on_cpu=settings.device is None and not torch.cuda.is_available())
    device = _device(settings, setup)
    measured = None
    if settings.device is None:
        measured = probe(setup, torch.device("cpu" if setup.on_cpu else "cuda"))
    steps = settings.trainer.max_steps
    speed = speed_of(setup, device, measured)
    return Plan(
        setup=setup,
        device=device,
        memory=memory_of(setup),
        speed=speed,
        is_measured=measured is not None,
        steps=steps if steps is not None and steps > 0 else None,
        checkpoints=_kept_checkpoints(settings.checkpoint, steps or 0, settings.trainer.val_check_interval),
        price=settings.price,
        not_counted=[*_not_counted(settings, setup, None if measured else speed)],
        remedies=[] if fits(setup, device) else remedies(setup, device),
        proposal=proposal(setup, device),
    )


def setup_of(settings: Any, config: GPTConfig, *, on_cpu: bool) -> Setup:
    trainer, data = settings.trainer, settings.data
    strategy = trainer.strategy
    name = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", ""))
    arguments = {} if isinstance(strategy, str) else dict(getattr(strategy, "init_args", None) or {})
    if name.rpartition(".")[2].removesuffix("_spawn").removesuffix("_fork") not in (*SINGLE, *REPLICATED):
        raise UserError(f"trainer.strategy={name} is none that plan knows; choose ddp or one of its kind")
    shard_replicas = settings.shard_replicas or arguments.get("shard_replicas", "none")
    precision, gather_dtype = _precision(trainer.precision), arguments.get("gather_dtype")
    check_gathering(gather_dtype, shard_replicas, precision)
    return Setup(
        config,
        data.seq_len,
        data.batch_size,
        accumulation=trainer.accumulate_grad_batches,
        precision=precision,
        optimizer=model_options(settings, "optimizer").get("name", "adamw"),
        activation_checkpointing=bool(_model_option(settings, "activation_checkpointing")),
        devices=_n_devices(trainer.devices, are_here=settings.device is None),
        nodes=settings.nodes if settings.nodes is not None else trainer.num_nodes,
        tensor_parallel_size=arguments.get("tensor_parallel_size", 1),
        sequence_parallel=arguments.get("sequence_parallel", False),
        shard_replicas=shard_replicas,
        reduce_dtype=arguments.get("reduce_dtype"),
        gather_dtype=gather_dtype,
        document_mask=data.document_mask,
        on_cpu=on_cpu,
    )


def _not_counted(settings: Any, setup: Setup, reckoned: Speed | None) -> Iterator[str]:
    """Says what makes a run differ from its plan; `reckoned` is a speed that is not measured."""
    layers = setup.accumulation * setup.config.n_layers
    if reckoned is not None and reckoned.arithmetic < LEAST_OF_A_LAYER * layers:
        yield "a host's time to start kernels, which may be longer than so little arithmetic"
    backend = choose_backend(
        _model_option(settings, "compile_backend"),
        device="cpu" if setup.on_cpu else "cuda",
        passes=(settings.trainer.max_steps or 0) * setup.accumulation,
        can_compile=True,
    )
    if backend is not None:
        yield f"blocks compiled by {backend} (model.compile_backend), which keep less and are faster"
    if setup.document_mask:
        yield "attention that documents cut short (data.document_mask): it is timed over whole rows"


def _model_option(settings: Any, name: str) -> Any:
    arguments = settings.model.get("init_args", settings.model)
    return arguments.get(name)


def _n_devices(given: Any, *, are_here: bool) -> int:
    """Counts the devices of a node; `auto` are all GPUs that are here, or one."""
    if isinstance(given, (list, tuple)):
        return len(given)
    text = str(given)
    if text == "-1" and not are_here:
        raise UserError("trainer.devices=-1 are all of this machine; with --device give how many a node has")
    if text in ("auto", "-1"):
        return max(1, torch.cuda.device_count())
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if not text.isdecimal():
        raise UserError(f"trainer.devices={given} is no number; give how many a node has")
    return int(text)


def _precision(given: Any) -> str:
    name = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    precision = name.get(str(given), str(given))
    if precision not in PRECISIONS:
        problem = f"trainer.precision={given} is none that plan knows"
        raise UserError(f"{problem}; choose one of {', '.join(PRECISIONS)}")
    return precision


def _vocabulary_of(tokenizer: str) -> int | None:
    """Counts the ids of a tokenizer that needs neither text nor network; None of another."""
    if is_trained_here(tokenizer):
        return requested_vocab_size(tokenizer)
    if tokenizer == "bytes" or Path(tokenizer).expanduser().is_dir():
        return load_tokenizer(tokenizer).vocab_size
    return VOCABULARIES.get(tokenizer)


def _device(settings: Any, setup: Setup) -> Device:
    device = this_device(setup) if settings.device is None else device_named(settings.device)
    for name in ("link_gb", "node_link_gb", "price"):
        if settings[name] is not None and not settings[name] > 0:
            raise UserError(f"{name}={settings[name]} is not above 0; raise it, or leave it out")
    return device.with_links(settings.link_gb, settings.node_link_gb)


def _kept_checkpoints(saver: Any, steps: int, every: Any) -> int:
    """Counts the best that are kept, of which there are no more than validations, and the last."""
    best = saver.save_top_k
    if best < 0 or steps > 0:
        validations = max(1, steps // every) if type(every) is int and every > 0 else 1
        best = validations if best < 0 else min(best, validations)
    return best + int(saver.save_last)
