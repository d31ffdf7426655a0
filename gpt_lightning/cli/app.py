"""Runs the verbs of a Trainer, and `prepare`: LightningCLI makes the objects of one verb from its options.

Its subcommands are not used (`run=False`): they know no `prepare`, and let a checkpoint's options win.
"""

import os
import sys
from contextlib import ExitStack
from glob import escape
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

from gpt_lightning.callbacks.evaluation import Evaluation
from gpt_lightning.callbacks.finite_guard import FiniteGuard
from gpt_lightning.callbacks.given_arguments import GivenArguments
from gpt_lightning.callbacks.orderly_stop import OrderlyStop
from gpt_lightning.callbacks.prediction_writer import PredictionWriter
from gpt_lightning.callbacks.progress import StepProgressBar
from gpt_lightning.callbacks.rank_guard import RankGuard
from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint
from gpt_lightning.callbacks.text_samples import TextSamples
from gpt_lightning.checkpoint.atomic import naming
from gpt_lightning.checkpoint.contents import DATA_KEY
from gpt_lightning.checkpoint.io import DurableCheckpointIO
from gpt_lightning.checkpoint.runs import checkpoints_folder, run_folder
from gpt_lightning.cli.checks import (
    check_averaging,
    check_monitors,
    check_options,
    check_paths,
    check_processes,
    check_vocabulary,
    refused_arguments,
)
from gpt_lightning.cli.closing import show_held_out
from gpt_lightning.cli.config_file import complete_words
from gpt_lightning.cli.errors import say, this_rank
from gpt_lightning.cli.fit_run import FitRun
from gpt_lightning.cli.main import VERBS
from gpt_lightning.cli.make_trainer import make_trainer
from gpt_lightning.cli.model_class import DEFAULT_CLASS, names_a_class
from gpt_lightning.cli.origin import Origin, find_origin, take_arguments, take_settings
from gpt_lightning.cli.ranks import (
    build_without_memory,
    check_launcher,
    check_options_under_launcher,
    follow_launcher,
    is_tensor_parallel,
    leaving_together,
    others_at_work,
    tell_of_no_rank,
)
from gpt_lightning.cli.recipes import give_way, name_of_run
from gpt_lightning.cli.trainer_parser import TrainerParser, files_in_utf8, limited_imports
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.parts import OthersAtWork
from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.journal import lock_output
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.parallel.averages import check_callbacks
from gpt_lightning.parallel.layers import check_sequence
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.trainer import GPTTrainer

RUN_NAME_HELP = "Folder under checkpoints/; by default the config's name, or the text's."
INIT_FROM_HELP = "Begin a fit with the weights and tokenizer of a checkpoint, a folder or a hub name."
OUTPUT_HELP = "predictions.jsonl beside the checkpoint by default."


class GPTLightningCLI(LightningCLI):
    """Makes the objects of one verb, whose options are all that its parser knows; `run_verb` then runs it.

    `words` are the command line, the verb first; the file `beneath` them holds what they do not say;
    `ending` is closed when the program ends.
    """

    def __init__(
        self, words: list[str], beneath: Path | None, rank_guard: RankGuard, ending: ExitStack
    ) -> None:
        self.verb, *args = words
        self._words, self._shows_all = words, "--help-all" in args
        self._rank_guard, self._ending = rank_guard, ending
        self.origin = Origin()
        self.given: Any = {}  # what the words and the files say, without defaults
        self._restored: dict[str, Any] = {}  # what the Trainer restores
        super().__init__(
            GPTLightningModule,
            TextDataModule,
            subclass_mode_model=names_a_class(args),
            run=False,
            save_config_callback=None,
            trainer_class=GPTTrainer,
            trainer_defaults={"enable_model_summary": False, "log_every_n_steps": 10},
            seed_everything_default=42,
            parser_class=TrainerParser,
            parser_kwargs={
                "prog": f"gpt-lightning {self.verb}",
                "description": VERBS[self.verb],
                "default_config_files": [] if beneath is None else [escape(str(beneath))],
            },
            auto_configure_optimizers=False,
            # Hyper-parameters with import paths in them are not to be stored, nor to be read.
            load_from_checkpoint_support=False,
            args=["--help" if word == "--help-all" else word for word in args],
        )

    def __getstate__(self) -> dict[str, Any]:
        # The strategies that spawn processes send the parser along, and with it this; the end stays here.
        return {**self.__dict__, "_ending": None}

    # Options

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        assert isinstance(parser, TrainerParser)
        parser.show_all = self._shows_all
        parser.add_argument("--run_name", type=str | None, default=None, help=RUN_NAME_HELP)
        parser.add_argument("--init_from", type=str | None, default=None, help=INIT_FROM_HELP)
        # Only fit makes these callbacks, though a configuration is given to other verbs too.
        of_fit = {"checkpoint": RunCheckpoint, "non_finite": FiniteGuard, "samples": TextSamples}
        of_fit |= {"evaluate": Evaluation, "progress": StepProgressBar}  # the last all make, but prepare
        for group, callback in of_fit.items():
            parser.add_class_arguments(callback, group, instantiate=False, sub_configs=True)
        parser.add_class_arguments(GenerationConfig, "generation")
        self._link_vocabulary(parser)
        if self.subclass_mode_model:
            parser.set_defaults({"model": {"class_path": DEFAULT_CLASS}})  # of files that name none
        if self.verb != "prepare":
            skipped: set[str | int] = {*self.subcommands()[self.verb]}
            self._verb_options = parser.add_method_arguments(GPTTrainer, self.verb, skip=skipped)
        if self.verb == "predict":
            parser.set_defaults({"return_predictions": False})
            parser.add_argument("--output", type=str | None, default=None, help=OUTPUT_HELP)

    def _link_vocabulary(self, parser: LightningArgumentParser) -> None:
        arguments = "model.init_args" if self.subclass_mode_model else "model"
        vocab_size = f"{arguments}.config.vocab_size"
        parser.link_arguments("data", vocab_size, compute_fn=self._choose_vocabulary, apply_on="instantiate")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Settles every option: what fits only a checkpoint's weights and split comes from it."""
        self.config = settings = parser.parse_args(args)  # type: ignore[arg-type]
        self.given = parser.parse_args(args, defaults=False)  # type: ignore[arg-type]
        give_way(settings, self.given)
        check_paths(settings)
        if settings.get("weights_only") is False:
            reason = "would let a checkpoint run code, and none of ours needs it; leave it out"
            raise UserError(f"weights_only=False {reason}")
        root = checkpoints_folder(settings.trainer.default_root_dir)
        if (own := settings.checkpoint.dirpath) is not None:
            settings.checkpoint.dirpath = os.path.expanduser(own)  # as Lightning will
        if self.verb in ("fit", "prepare"):
            settings.run_name = name_of_run(settings)
            run_folder(root, settings.run_name)
        self.origin = self._find_origin(root)
        if (checkpoint := self.origin.checkpoint) is not None:
            self._restored = checkpoint.contents if self.origin.init_from is None else {}
            take_settings(self.verb, settings, self.given, self.origin)
            if self.subclass_mode_model:
                take_arguments(settings, self.given, checkpoint, parser)
        check_options(self.verb, settings)
        self._check_machine()
        if self.verb != "prepare":
            settings.weights_only = True
        if self.verb == "fit":
            self._begin_run(settings, root)

    def _find_origin(self, root: Path) -> Origin:
        return find_origin(self.verb, self.config, root)

    def _check_machine(self) -> None:
        check_processes(self.config)

    def _begin_run(self, settings: Any, root: Path) -> None:
        check_options_under_launcher(settings.trainer.devices, settings.trainer.num_nodes)
        self._fit = FitRun(settings, self.origin, self._restored, self._words)
        self._fit.open_folder(root, self._ending)

    # From options to objects

    def _choose_vocabulary(self, datamodule: TextDataModule) -> int:
        """Returns a checkpoint's vocabulary size, if there is one, and takes its tokenizer: no other fits it.

        Its model may know more ids than its tokenizer gives.
        """
        checkpoint = self.origin.checkpoint
        if checkpoint is None:
            size, source = datamodule.vocab_size, f"data.tokenizer={datamodule.tokenizer}"
        else:
            datamodule.use_tokenizer(checkpoint.tokenizer)
            size, source = checkpoint.config.vocab_size, str(self.origin.init_from or checkpoint.path)
        check_vocabulary(self.given, size, source)
        return size

    @override
    def instantiate_classes(self) -> None:
        if self.verb == "prepare":
            self.datamodule = TextDataModule(**self.config.data.as_dict())
            self._choose_vocabulary(self.datamodule)
            return
        on_meta = (build_without_memory, GPTLightningModule, True)
        instantiators = [on_meta] if is_tensor_parallel(self.config) else None
        with refused_arguments():
            self.config_init = self.parser.instantiate(self.config, instantiators=instantiators)
        self.datamodule, self.model = self.config_init.data, self.config_init.model
        self.model.generation = self.config_init.generation
        self.trainer = self.instantiate_trainer()
        if self.verb == "fit":
            check_averaging(self.trainer.callbacks, self.trainer.max_steps)
        if isinstance(strategy := self.trainer.strategy, TensorParallelDDPStrategy):
            strategy.check(self.model)
            check_callbacks(self.trainer.callbacks, save_sharded=strategy.save_sharded)
            if self.verb == "fit" and strategy.sequence_parallel:
                check_sequence(self.datamodule.seq_len, strategy.tensor_parallel_size)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = {**self.config_init.trainer, **kwargs}
        follow_launcher(settings)
        for name in ("callbacks", "plugins"):
            given = settings[name] or []
            settings[name] = [*given] if isinstance(given, (list, tuple)) else [given]
        callbacks = settings["callbacks"]
        if self._restored:
            named = self.given.get("trainer.callbacks") or []
            specs = named if isinstance(named, list) else [named]
            arguments = [getattr(spec, "init_args", None) or {} for spec in specs]
            callbacks.append(GivenArguments([*zip(callbacks, map(dict, arguments))]))
        shows_progress = any(isinstance(callback, ProgressBar) for callback in callbacks)
        callbacks.append(self._rank_guard)  # before those that talk to other ranks when a run fails
        if not shows_progress and settings["enable_progress_bar"] is not False:
            callbacks.append(StepProgressBar(**self.config.progress))
        writer = DurableCheckpointIO()
        settings["plugins"].append(writer)
        self._rank_guard.before_exit = writer.wait
        if self.verb == "fit":
            callbacks += self._fit.callbacks(settings, self.parser, self.model.n_parameters)
        else:
            settings["logger"] = settings["logger"] or False
            settings["enable_checkpointing"] = False
        if self.verb == "predict":
            settings["logger"] = False
            callbacks.append(self._prediction_writer())
        trainer = make_trainer(settings)
        check_launcher(trainer.num_devices, trainer.num_nodes)
        tell_of_no_rank(trainer.num_devices * trainer.num_nodes)
        if self.verb == "fit":  # a signal ends any other verb as it ends any process
            trainer.callbacks.append(OrderlyStop())  # after those for checkpoints, which Lightning puts last
        return trainer

    def _prediction_writer(self) -> PredictionWriter:
        """Locks the file that is written: a mistake in it fails now rather than after the generation."""
        checkpoint = self.origin.checkpoint
        assert checkpoint is not None
        given = self.config.output
        if given is not None and (not given or Path(given).exists() and not Path(given).is_file()):
            raise UserError(f"output={given!r} is no file; name one, such as predictions.jsonl")
        output = Path(given) if given else checkpoint.path.parent / "predictions.jsonl"
        with naming(f"output={output}", "give another --output"):
            output.parent.mkdir(parents=True, exist_ok=True)
            if this_rank() == 0:
                self._ending.callback(lock_output(output))
        return PredictionWriter(output, sys.stdout, checkpoint)

    # Verbs

    def run_verb(self) -> None:
        if self.verb != "predict":
            # Before the Trainer starts: unusable text is to be found before anything is written.
            try:
                self._prepare_text()
            except OthersAtWork as work:
                say(str(work))
        if self.verb == "prepare":
            return
        self._rank_guard.begin(self.trainer)
        options = {name: self.config[name] for name in self._verb_options}
        quiet = {"verbose": False} if "verbose" in options else {}  # the table is ours
        results = getattr(self.trainer, self.verb)(self.model, datamodule=self.datamodule, **options | quiet)
        if options.get("verbose") and self.trainer.is_global_zero:
            show_held_out(self.verb, results)
        if self.verb == "fit" and self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            self._fit.tell_of_end(self.trainer)

    def _prepare_text(self) -> None:
        saved = self._restored.get(DATA_KEY, {})
        if self.verb == "fit":
            self.datamodule.resume_text(saved)
        splits = self.datamodule.prepare(others_at_work() if self.verb == "prepare" else None)
        for name, split in splits.items():
            where = "repeat another" if name.startswith("train") else "also in train"
            repeated = f", {split.n_repeated:,} of them {where}" if split.n_repeated else ""
            documents = f"{split.n_documents:,} document{'s' if split.n_documents != 1 else ''}"
            say(f"{name}: {split.n_tokens:,} tokens in {documents}{repeated}")
        if self.verb == "fit":
            self._fit.evaluation.prepare(self.model.model, self.datamodule.text_tokenizer)
            if not self.datamodule.keeps_text("val"):
                check_monitors(self.trainer.callbacks)
        if self.verb in ("validate", "test"):
            if warning := self.datamodule.text_warning(saved, self.verb):
                say(f"warning: {warning}")
        if self.verb == "test" and not any(name.startswith("test") for name in splits):
            say("no data.test_files: what follows is measured on the validation text")


def run(words: list[str]) -> None:
    """Runs one command line, the verb first."""
    rank_guard = RankGuard()
    with leaving_together(rank_guard), ExitStack() as ending, files_in_utf8(), limited_imports(words) as rest:
        GPTLightningCLI(*complete_words(rest), rank_guard, ending).run_verb()
