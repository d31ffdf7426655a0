"""TextDataModule turns text files and prompts into the batches that Lightning asks for."""

import logging
from collections.abc import Callable
from typing import Any, Literal, NoReturn

from lightning.pytorch import LightningDataModule
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.utils.data import DataLoader
from typing_extensions import override

from gpt_lightning.data.corpus import no_train_files
from gpt_lightning.data.corpus_identity import (
    refuse_other_settings,
    settings_of_a_run,
    tokenizer_of_checkpoint,
)
from gpt_lightning.data.loader import (
    EpochBatches,
    HeldOutBatches,
    TokenBatch,
    WindowBatches,
    batch_loader,
    rank_and_ranks,
)
from gpt_lightning.data.mixed_text import MixedSplit
from gpt_lightning.data.mixture import Mixture, MixtureSource
from gpt_lightning.data.option_checks import check_options
from gpt_lightning.data.overlap import refuse_shared_sources
from gpt_lightning.data.position import Position, TrainingOrder
from gpt_lightning.data.prompts import (
    PromptBatch,
    PromptShare,
    read_prompts,
    special_token_hint,
)
from gpt_lightning.data.text_source import TextSource, beginnings, keeps_text
from gpt_lightning.data.text_state import resume_texts, state_of_texts, warning_of_texts
from gpt_lightning.data.token_cache import TokenSplit
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.data.tokenizer_cache import tokenizer_named
from gpt_lightning.data.windows import Epochs, SampleOrder
from gpt_lightning.exit_codes import UserError

_log = logging.getLogger("gpt_lightning")


class TextDataModule(LightningDataModule):
    """Turns text files into training and evaluation batches, and reads prompts to generate from.

    Args:
        train_files: Files, folders or globs of .txt, .jsonl or .parquet text (.gz and .zst too), or
            `python:docs`, the documentation that every Python carries.
        mixture: Several texts in the place of train_files, each with its share of the tokens.
        mixture_used_up: What follows when one of them is used up: it begins its next epoch, or the run ends.
        val_files: Text to validate on; without it `val_fraction` of the training text is held out.
        test_files: Text to test on; without it the validation text is.
        val_fraction: Share of the training text to hold out, by whole documents where there are enough.
        drop_repeated: Leave out of the held-out text the documents that are in the training text, too.
        tokenizer: `bpe` (trained on the training text), `bpe:8192` (of that size), `bytes`, a folder, or a
            name on the Hugging Face hub.
        seq_len: Tokens in a training window, at most the model's max_position_embeddings.
        batch_size: Windows per data-parallel rank and step; in `predict`, completions generated at a time.
        num_workers: Processes that load batches; they change the speed and never the order.
        cache_dir: Where tokenized text is kept for the next run.
        document_mask: Keep attention within a document and count positions from its start.
        text_key: Key of the text in .jsonl rows, column of it in .parquet files.
        document_separator: Text that separates the documents within a .txt file; without it a file is one.
        seed: Decides what is held out and the order of samples.
        prompts: Text or texts to continue with `predict`.
        prompts_file: More of them: a .txt file of one a line, or a .jsonl file with the key `prompt`.
        parse_special_tokens: Read the name of a special token in a prompt, as <|endoftext|>, as that token.
    """

    def __init__(
        self,
        *,
        train_files: list[str] | str | None = None,
        mixture: list[MixtureSource] | None = None,
        mixture_used_up: Literal["repeat", "stop"] = "repeat",
        val_files: list[str] | str | None = None,
        test_files: list[str] | str | None = None,
        val_fraction: float = 0.1,
        drop_repeated: bool = False,
        tokenizer: str = "bpe",
        seq_len: int = 1024,
        batch_size: int = 8,
        num_workers: int = 0,
        cache_dir: str = ".cache/gpt_lightning",
        document_mask: bool = False,
        text_key: str = "text",
        document_separator: str | None = None,
        seed: int = 42,
        prompts: list[str] | str | None = None,
        prompts_file: str | None = None,
        parse_special_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.train_files, self.val_files, self.test_files = train_files, val_files, test_files
        self.val_fraction, self.drop_repeated = val_fraction, drop_repeated
        self.tokenizer, self.cache_dir = tokenizer, cache_dir
        self.seq_len, self.batch_size, self.num_workers = seq_len, batch_size, num_workers
        self.document_mask = document_mask
        self.text_key, self.document_separator = text_key, document_separator
        self.seed = seed
        self.prompts, self.prompts_file = prompts, prompts_file
        self.parse_special_tokens = parse_special_tokens
        self.all_prompts: list[str] = []  # once set up to predict
        self.finished_prompts: set[int] = set()  # places in it of those that are not to be run again
        self.mixture = None if mixture is None else Mixture(mixture)
        self.mixture_used_up = mixture_used_up
        check_options(self)
        self.sources = self._sources()
        self._text_tokenizer: TextTokenizer | None = None
        self._order = TrainingOrder(self)

    @classmethod
    @override
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError("a checkpoint holds no TextDataModule; make one of its options")

    @override
    def __str__(self) -> str:
        # Lightning's own would build every loader, and with them the token cache.
        return type(self).__name__

    # ---- tokenizer and corpus

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """Is loaded, or trained on the training text, at first use."""
        if self._text_tokenizer is None:
            named = self.tokenizer, self.sources, self.cache_dir
            self._text_tokenizer = tokenizer_named(*named, self._check_tokens)
        return self._text_tokenizer

    @property
    def vocab_size(self) -> int:
        """Counts the ids that the tokenizer can give, for the model's config."""
        return self.text_tokenizer.vocab_size

    def use_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Encodes with this tokenizer, such as a checkpoint's, whatever `data.tokenizer` says."""
        self._text_tokenizer = tokenizer
        for source in self.sources:
            source.splits = None

    def prepare(self, others: Literal["wait", "leave"] | None = None) -> dict[str, TokenSplit]:
        """Opens the token cache, building what is missing or stale: the splits that have tokens, by name.

        Of a mixture the names are as `train/novels`. Every process may call it: one builds, the others wait.
        With `others` each builds some of it, and then waits for them, or leaves with OthersAtWork.
        """
        if any(source.splits is None for source in self.sources):
            if self.mixture is not None:
                refuse_shared_sources({str(source.name): source.corpus().sources for source in self.sources})
            cache = self.text_tokenizer, self.cache_dir, self._check_tokens
            for source in self.sources:
                source.prepare(*cache, drop_repeated=self.drop_repeated, others=others)
        return dict(named for source in self.sources for named in source.named_splits())

    def _check_tokens(self, source: TextSource, n_tokens: int) -> None:
        label = source.label("train_files")
        if n_tokens == 0:
            raise UserError(f"{label}={source.files} is empty; give files with text")
        if n_tokens < self.seq_len + 1:
            needs = f"data.seq_len={self.seq_len} needs {self.seq_len + 1} training tokens"
            remedy = f"lower data.seq_len or add text to {label}"
            raise UserError(f"{needs}, but there are {n_tokens}; {remedy}")

    def keeps_text(self, name: str, of: str | None = None) -> bool:
        """Tells whether a split's tokens say all that its text says; else its bits per byte mean nothing."""
        splits = self._splits(name, of)
        return all(keeps_text(split, self.text_tokenizer) for split in splits)

    def split_counts(self, name: str, of: str | None = None) -> tuple[int, int]:
        """Counts tokens and UTF-8 bytes of a split: their ratio turns nats per token into bits per byte.

        It is all of the split, or what is of one source.
        """
        splits = self._splits(name, of)
        return sum(split.n_tokens for split in splits), sum(split.n_bytes for split in splits)

    def beginnings(self, name: str, count: int) -> list[str]:
        """Returns the first words of up to so many documents of a split, from all over it."""
        return beginnings(self._splits(name), self.text_tokenizer, count)

    def _splits(self, name: str, of: str | None = None) -> list[TokenSplit]:
        """Finds what each source, or one of them, has of a split."""
        self.prepare()
        sources = (source for source in self.sources if of in (None, source.name))
        return [split for source in sources if (split := source.split(name)) is not None]

    def _sources(self) -> tuple[TextSource, ...]:
        patterns = {name: getattr(self, name) for name in ("train_files", "val_files", "test_files")}
        settings = {
            name: getattr(self, name) for name in ("val_fraction", "seed", "text_key", "document_separator")
        }
        if self.mixture is None:
            return (TextSource(patterns, settings),)
        return self.mixture.texts(patterns, settings)

    # ---- loaders

    @override
    def setup(self, stage: str) -> None:
        # Not in prepare_data, which is not told the stage: predict needs a tokenizer and no corpus.
        if stage == "predict":
            self.all_prompts = read_prompts(self.prompts, self.prompts_file)
            self.finished_prompts = set()
            return
        self.prepare()
        if stage == "fit":
            if self.train_files is None and self.mixture is None:
                raise no_train_files()
            self._order.start()
            if self.mixture is not None and not self._order.restored.batches:
                self.mixture.starts = None  # those of an earlier run
        elif not self._splits({"validate": "val"}.get(stage, stage)):
            option = f"data.val_fraction={self.val_fraction}"
            raise UserError(f"{option} leaves no text to {stage} on; raise it or give data.val_files")

    @override
    def train_dataloader(self) -> DataLoader[TokenBatch]:
        splits = self._splits("train")
        if not splits:
            raise no_train_files()
        text = splits[0] if self.mixture is None else MixedSplit(splits)
        dataset = self._window_batches(text, self.train_order())
        if self.trainer is None:
            return self._whole_loader(dataset)
        self._order.take_epochs(dataset.epochs)
        return self._loader(dataset, self._order.batches)

    def train_order(self) -> SampleOrder:
        """Orders the training windows and deals them to batches, from where a run begins or goes on."""
        n_tokens = [split.n_tokens for split in self._splits("train")]
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        deal = self._deal(start=self._order.restored.consumed_samples, accumulate=accumulate)
        if self.mixture is None:
            return Epochs(n_tokens=n_tokens[0], seed=self.seed, **deal)
        return self.mixture.order(n_tokens, self.seed, **deal)

    @override
    def val_dataloader(self) -> DataLoader[TokenBatch] | list[Any]:
        return self._evaluation_loader("val")

    @override
    def test_dataloader(self) -> DataLoader[TokenBatch] | list[Any]:
        return self._evaluation_loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        """Gives one batch, of all that is left to this rank: rows that end are replaced within it."""
        rank, ranks = self._rank_and_ranks()
        self.hint_at_special_tokens(self.all_prompts)
        left = self.all_prompts, self.finished_prompts
        share = PromptShare(*left, self.text_tokenizer, rank, ranks, self.parse_special_tokens)
        return batch_loader(share, lambda: EpochBatches(range(1), 1))

    def hint_at_special_tokens(self, prompts: list[str]) -> None:
        """Says in a line that a prompt holds the name of a special token, where that is read as text."""
        hint = special_token_hint(prompts, self.text_tokenizer, "data.parse_special_tokens")
        if hint and not self.parse_special_tokens:
            rank_zero_only(_log.info)(hint)

    def _evaluation_loader(self, name: str) -> DataLoader[TokenBatch] | list[Any]:
        """Scores every token once, and no batch has text of two sources."""
        parts = {}
        for source in self.sources if self._splits(name) else ():
            if (split := source.split(name)) is not None:
                epochs = Epochs(n_tokens=split.n_tokens, **self._deal())
                parts[source.name] = self._window_batches(split, epochs)
        return self._whole_loader(HeldOutBatches(parts)) if parts else []

    def _whole_loader(self, dataset: WindowBatches | HeldOutBatches) -> DataLoader[TokenBatch]:
        batches = EpochBatches(range(dataset.first_batches), len(dataset))
        return self._loader(dataset, lambda: batches)

    def _deal(self, **place: int) -> dict[str, int]:
        """Tells how samples are dealt to the batches of all ranks."""
        return {"seq_len": self.seq_len, "global_batch": self.batch_size * self._rank_and_ranks()[1], **place}

    def _window_batches(self, split: TokenSplit | MixedSplit, epochs: SampleOrder) -> WindowBatches:
        rank, ranks = self._rank_and_ranks()
        return WindowBatches(
            split=split,
            epochs=epochs,
            rank=rank,
            ranks=ranks,
            document_mask=self.document_mask,
            vocab_size=self.vocab_size,
        )

    def _loader(
        self, dataset: WindowBatches | HeldOutBatches, batches: Callable[[], EpochBatches]
    ) -> DataLoader[TokenBatch]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return batch_loader(dataset, batches, num_workers=self.num_workers, pin_memory=on_gpu)

    def _rank_and_ranks(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else rank_and_ranks(self.trainer)

    # ---- the position in the training order

    @property
    def consumed_samples(self) -> int:
        """Counts the windows trained on so far, over all ranks and epochs."""
        return self._order.position().consumed_samples

    @property
    def reached_samples(self) -> int:
        """Counts the windows trained on with those of the batch that is under way."""
        return self._order.reached()

    def close_epoch_first(self) -> None:
        """Resumes a checkpoint saved when all of an epoch was trained and Lightning had not closed it."""
        self._order.close_epoch_first()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **self._order.position()._asdict(),
            "settings": settings_of_a_run(self),
            "tokenizer": self.text_tokenizer.state,
            **state_of_texts(self.sources, self.mixture),
        }

    def resume_text(self, state: dict[str, Any]) -> None:
        """Refuses, now and from now on, other text than that of the run whose datamodule's state this is."""
        resume_texts(self.sources, self.mixture, state)

    def text_warning(self, state: dict[str, Any], verb: str) -> str | None:
        """Warns that a model may know what it is judged on: another part is held out of another text."""
        return warning_of_texts(self.sources, state, verb)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.trainer is None or self.trainer.state.fn == "fit":
            refuse_other_settings(self, state_dict["settings"])
            self.resume_text(state_dict)
        own, saved = self._text_tokenizer, state_dict["tokenizer"]
        self._text_tokenizer = tokenizer_of_checkpoint(own, saved, self.tokenizer)
        self._order.restore(Position(*(state_dict[name] for name in Position._fields)))
