"""The program: LightningCLI with its four verbs and `prepare`, and its known stumbling blocks removed."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from gpt_lightning.callbacks.exact_resume import ExactResume
from gpt_lightning.callbacks.finite_guard import FiniteGuard
from gpt_lightning.callbacks.initial_weights import InitialWeights
from gpt_lightning.callbacks.orderly_stop import OrderlyStop
from gpt_lightning.callbacks.prediction_writer import PredictionWriter
from gpt_lightning.callbacks.progress import StepProgressBar
from gpt_lightning.callbacks.rank_guard import RankGuard
from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint
from gpt_lightning.callbacks.run_config import RunConfig
from gpt_lightning.callbacks.text_samples import TextSamples
from gpt_lightning.callbacks.throughput import Throughput
from gpt_lightning.checkpoint.contents import DATA_KEY, ORIGIN_KEY
from gpt_lightning.checkpoint.io import DurableCheckpointIO
from gpt_lightning.checkpoint.runs import (
    checkpoints_folder,
    choose_run_folder,
    open_named_folder,
    open_run_folder,
)
from gpt_lightning.cli.checks import (
    check_before_seeding,
    check_before_work,
    check_only_sampled,
    say,
    warn_of_untrained_positions,
)
from gpt_lightning.cli.config_file import complete_words
from gpt_lightning.cli.errors import in_order
from gpt_lightning.cli.imports import limited_imports
from gpt_lightning.cli.noise import quiet
from gpt_lightning.cli.origin import Origin, find_origin, take_settings
from gpt_lightning.cli.parser import shorten
from gpt_lightning.cli.report import log_hyperparameters, tell_how_to_go_on
from gpt_lightning.cli.tensor_parallel import build_without_memory, check_topology, is_tensor_parallel
from gpt_lightning.cli.trainer_parser import Parser
from gpt_lightning.cli.verbs import VERBS
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.journal import lock_output
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.trainer import GPTTrainer

DEFAULT_MAX_STEPS = 2000


class GPTLightningCLI(LightningCLI):
    """`args` are the words of the command line, the verb first; `ending` is closed when the program ends."""

    def __init__(self, args: list[str], rank_guard: RankGuard, ending: ExitStack) -> None:
        self._words = args
        self._rank_guard, self._ending = rank_guard, ending
        self._origin = Origin()
        self._run_folder = Path()
        super().__init__(
            GPTLightningModule,
            TextDataModule,
            save_config_callback=RunConfig,
            trainer_class=GPTTrainer,
            trainer_defaults={"enable_model_summary": False, "log_every_n_steps": 10},
            seed_everything_default=42,
            parser_class=Parser,
            parser_kwargs={
                "prog": "gpt-lightning",
                **{verb: {"description": VERBS[verb]} for verb in self.subcommands()},
            },
            auto_configure_optimizers=False,
            # Hyper-parameters with import paths in them are not to be stored, nor to be read.
            load_from_checkpoint_support=False,
            args=args,
        )

    def __getstate__(self) -> dict[str, Any]:
        # The strategies that spawn processes send the parser along, and with it this; the end stays here.
        return {**self.__dict__, "_ending": None}

    @property
    def _restored(self) -> dict[str, Any]:
        """What the Trainer restores; nothing where a run begins."""
        return self._origin.restored.contents if self._origin.restored is not None else {}

    # Options

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The verb that is asked for: the parser of each takes a tenth of a second to make."""
        verb = self._words[0]
        return {verb: {**LightningCLI.subcommands(), "prepare": {"datamodule"}}[verb]}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_name",
            type=str | None,
            default=None,
            help="Folder under checkpoints/; by default the config's name.",
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="Begin a fit with the weights and tokenizer of a checkpoint, or a GPT-2 folder or hub name.",
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(FiniteGuard, "non_finite")
        parser.add_lightning_class_args(TextSamples, "samples")
        parser.add_class_arguments(GenerationConfig, "generation")
        parser.link_arguments(
            "data", "model.config.vocab_size", compute_fn=self._choose_vocabulary, apply_on="instantiate"
        )

    @override
    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})
            parser.add_argument(
                "--output",
                type=str | None,
                default=None,
                help="predictions.jsonl beside the checkpoint by default.",
            )
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parser.parse_args(self._words)  # without the parent's warning about passing `args`

    @override
    def _parse_ckpt_path(self) -> None:
        """What fits only the checkpoint's weights and split comes from it, all else from the command line.

        Lightning would let all of the checkpoint's hyper-parameters win, without a word.
        """
        verb = self.config["subcommand"]
        settings = self.config[verb]
        check_before_seeding(settings)
        root = checkpoints_folder(settings.trainer.default_root_dir)
        if verb in ("fit", "prepare"):
            self._name_run(settings)
        self._origin = find_origin(verb, settings, root)
        if self._origin.checkpoint is not None:
            given = self.parser.parse_args(self._words, defaults=False)[verb]
            take_settings(verb, settings, given, self._origin)
        if verb != "prepare":
            settings.weights_only = True
        if verb == "fit":
            origin = self._origin
            folder = root / settings.run_name
            self._run_folder = choose_run_folder(folder, origin.path, begins_again=origin.begins_again)

    def _name_run(self, settings: Any) -> None:
        if settings.run_name is None:
            files = settings.config or []
            settings.run_name = Path(str(files[-1])).stem if files else "run"
        if Path(settings.run_name).name != settings.run_name or settings.run_name in ("", ".."):
            raise UserError(
                f"run_name={settings.run_name!r} is not a plain folder name; leave out the slashes"
            )

    # From options to objects

    @override
    def before_instantiate_classes(self) -> None:
        assert self.subcommand is not None
        settings = self.config[self.subcommand]
        check_before_work(settings, needs_data=self.subcommand != "predict")
        if self.subcommand == "fit":
            trainer = settings.trainer
            if trainer.max_steps == -1 and trainer.max_epochs is None and trainer.max_time is None:
                trainer.max_steps = DEFAULT_MAX_STEPS
                say(f"no trainer.max_steps or max_epochs given: training for {DEFAULT_MAX_STEPS:,} steps")
            check_only_sampled(settings.generation)
            if self._origin.initial is None and ORIGIN_KEY not in self._restored:
                positions = settings.model.config.max_position_embeddings
                warn_of_untrained_positions(settings.data.seq_len, positions)
            self._open_run(settings)

    @rank_zero_only
    def _open_run(self, settings: Any) -> None:
        """Keep other processes out of the run's folder; only the first rank writes into it."""
        if not settings.trainer.fast_dev_run:
            root = checkpoints_folder(settings.trainer.default_root_dir)
            folder, path = root / settings.run_name, self._origin.path
            run = open_run_folder(folder, path, begins_again=self._origin.begins_again)
            self._ending.callback(run.close)
            self._run_folder = run.folder
            if (own := settings.checkpoint.dirpath) is not None:
                option = f"checkpoint.dirpath={own}"
                self._ending.callback(open_named_folder(Path(own), path, option).close)
        settings.run_name = self._run_folder.name

    def _choose_vocabulary(self, datamodule: TextDataModule) -> int:
        """A checkpoint's, with its own tokenizer, if there is one: no other fits its weights.

        Its model may know more ids than its tokenizer gives.
        """
        checkpoint = self._origin.checkpoint
        if checkpoint is None:
            return datamodule.vocab_size
        datamodule.use_tokenizer(checkpoint.tokenizer)
        return checkpoint.config.vocab_size

    @override
    def instantiate_classes(self) -> None:
        if self.subcommand == "prepare":
            self.config_init = self.config
            self.datamodule = TextDataModule(**self._get(self.config, "data").as_dict())
            if self._origin.checkpoint is not None:
                self.datamodule.use_tokenizer(self._origin.checkpoint.tokenizer)
            return
        if is_tensor_parallel(self.config[self.config["subcommand"]]):
            assert isinstance(self.parser, Parser)
            self.parser.instantiators = [(build_without_memory, GPTLightningModule, True)]
        super().instantiate_classes()
        self.model.generation = self._get(self.config_init, "generation")
        check_topology(
            self.trainer, self.model, self.datamodule.seq_len if self.subcommand == "fit" else None
        )

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = {**self._get(self.config_init, "trainer"), **kwargs}
        callbacks: list[Callback] = []
        if not any(isinstance(callback, ProgressBar) for callback in _as_list(settings["callbacks"])):
            if settings["enable_progress_bar"] is not False:
                callbacks.append(StepProgressBar())
        writer = DurableCheckpointIO()
        settings["plugins"] = [*_as_list(settings["plugins"]), writer]
        self._rank_guard.before_exit = writer.wait
        callbacks.insert(0, self._rank_guard)  # before those that talk to other ranks when a run fails
        if self.subcommand == "fit":
            callbacks += self._prepare_fit(settings)
        else:
            self.save_config_callback = None
            settings["logger"] = settings["logger"] or False
            settings["enable_checkpointing"] = False
            if self.subcommand == "predict":
                settings["logger"] = False
                assert self._origin.restored is not None
                digest = self._origin.restored.digest
                callbacks.append(PredictionWriter(self._open_output(), sys.stdout, digest))
        by_steps = type(settings["val_check_interval"]) is int
        if by_steps:
            settings["check_val_every_n_epoch"] = None
        try:
            trainer = self._instantiate_trainer(settings, callbacks)
        except (TypeError, ValueError, MisconfigurationException) as error:
            prefix = "" if str(error).startswith("trainer.") else "trainer: "
            raise UserError(prefix + shorten(str(error))) from error
        if by_steps and not trainer.fast_dev_run:
            # Lightning counts micro-batches here; everything else in a configuration counts optimizer steps.
            trainer.val_check_interval *= trainer.accumulate_grad_batches
        trainer.callbacks.append(OrderlyStop())  # after those for checkpoints, which Lightning puts last
        return trainer

    def _prepare_fit(self, settings: dict[str, Any]) -> list[Callback]:
        if settings["logger"] in (None, True):
            # Curves of a killed run go on after its last checkpoint: what comes again is shown once.
            again_from = 1 + self._restored.get("global_step", 0)
            settings["logger"] = TensorBoardLogger(
                self._run_folder, name="logs", version="", default_hp_metric=False, purge_step=again_from
            )
        self.save_config_kwargs = {"folder": self._run_folder}
        checkpoint = self._get(self.config_init, "checkpoint")
        checkpoint.dirpath = checkpoint.dirpath or str(self._run_folder)
        guard, samples = (self._get(self.config_init, name) for name in ("non_finite", "samples"))
        begins_with = self._origin.initial.contents if self._origin.initial is not None else None
        initial = InitialWeights(self._origin.init_from, begins_with)
        callbacks = [initial, guard, ExactResume(), Throughput(), samples]
        return callbacks if settings["enable_checkpointing"] is False else [*callbacks, checkpoint]

    def _open_output(self) -> Path:
        assert self._origin.path is not None
        given = self._get(self.config, "output")
        if given is not None and (not given or Path(given).exists() and not Path(given).is_file()):
            raise UserError(f"output={given!r} is no file; name one, such as predictions.jsonl")
        output = Path(given) if given else self._origin.path.parent / "predictions.jsonl"
        output.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the generation
        self._lock(output)
        return output

    @rank_zero_only
    def _lock(self, output: Path) -> None:
        self._ending.callback(lock_output(output))

    # Verbs

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand != "predict":
            # Before the Trainer starts: unusable text is to be found before anything is written.
            self._prepare_text(subcommand)
        if subcommand != "prepare":
            self._rank_guard.begin(self.trainer)
            super()._run_subcommand(subcommand)

    def _prepare_text(self, verb: str) -> None:
        saved = self._restored.get(DATA_KEY, {})
        if verb == "fit":
            self.datamodule.trained_text.resume(saved)
        for name, split in self.datamodule.prepare().items():
            say(f"{name}: {split.n_tokens:,} tokens in {split.n_documents:,} documents")
        if verb in ("validate", "test") and (warning := self.datamodule.trained_text.warning(saved, verb)):
            say(f"warning: {warning}")

    def after_fit(self) -> None:
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            data = self._get(self.config, "data").as_dict()
            chosen = {name: data[name] for name in ("tokenizer", "seq_len", "batch_size", "document_mask")}
            log_hyperparameters(self.trainer, {**self.model.hparams, "data": chosen})
            tell_how_to_go_on(self.trainer, self._run_folder, self._get(self.config_init, "samples").latest)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def run(words: list[str]) -> None:
    """Run one command line, the verb first; a user's mistake ends it with one line and exit code 2."""
    Parser.show_all = "--help-all" in words
    words = ["--help" if word == "--help-all" else word for word in words]
    quiet()
    rank_guard = RankGuard()
    with in_order(rank_guard), ExitStack() as ending, limited_imports(words) as words:
        GPTLightningCLI(complete_words(words), rank_guard, ending)
