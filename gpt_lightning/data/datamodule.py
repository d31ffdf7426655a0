"""TextDataModule turns text files and prompts into the batches that Lightning asks for."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NoReturn

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.utils.data import DataLoader
from typing_extensions import override

from gpt_lightning.data.corpus import Corpus, no_train_files
from gpt_lightning.data.corpus_identity import (
    TrainedText,
    refuse_other_settings,
    settings_of_a_run,
    tokenizer_of_checkpoint,
)
from gpt_lightning.data.loader import EpochBatches, TokenBatch, WindowBatches, batch_loader, rank_and_ranks
from gpt_lightning.data.position import Position, TrainingOrder
from gpt_lightning.data.prompts import (
    PromptBatch,
    PromptShare,
    first_words,
    read_prompts,
    special_token_hint,
)
from gpt_lightning.data.token_cache import TokenSplit, loss_warning, prepare_tokens
from gpt_lightning.data.tokenizer import TextTokenizer, is_trained_here, requested_vocab_size
from gpt_lightning.data.tokenizer_cache import tokenizer_named
from gpt_lightning.data.windows import Epochs
from gpt_lightning.exit_codes import UserError

_log = logging.getLogger("gpt_lightning")

OPENING = 64  # tokens in which a document's first words lie


class TextDataModule(LightningDataModule):
    """Turns text files into training and evaluation batches, and reads prompts to generate from.

    Args:
        train_files: Files, folders or globs of .txt, .jsonl or .parquet text (.gz and .zst too), or
            `python:docs`, the documentation that every Python carries.
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
        self._check_options()
        self._text_tokenizer: TextTokenizer | None = None
        self._splits: dict[str, TokenSplit] | None = None
        self.trained_text = TrainedText()
        self._order = TrainingOrder(self)

    def _check_options(self) -> None:
        if not 0 <= self.val_fraction < 1:
            option = f"data.val_fraction={self.val_fraction}"
            raise UserError(f"{option} is not in [0, 1); choose a fraction such as 0.1")
        for option, least in (("seq_len", 1), ("batch_size", 1), ("num_workers", 0), ("seed", 0)):
            if getattr(self, option) < least:
                raise UserError(f"data.{option}={getattr(self, option)} is below {least}; raise it")
        if self.document_separator == "":
            raise UserError("data.document_separator='' separates nothing; leave it out or give some text")
        if is_trained_here(self.tokenizer):
            requested_vocab_size(self.tokenizer)

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
            named = self.tokenizer, self._corpus, self.cache_dir
            self._text_tokenizer = tokenizer_named(*named, self._check_tokens)
        return self._text_tokenizer

    @property
    def vocab_size(self) -> int:
        """Counts the ids that the tokenizer can give, for the model's config."""
        return self.text_tokenizer.vocab_size

    def use_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Encodes with this tokenizer, such as a checkpoint's, whatever `data.tokenizer` says."""
        self._text_tokenizer = tokenizer
        self._splits = None

    def prepare(self, others: Literal["wait", "leave"] | None = None) -> dict[str, TokenSplit]:
        """Opens the token cache, building what is missing or stale: the splits that have tokens, by name.

        Every process may call it: one builds, the others wait. With `others` each builds some of it, and then
        waits for them, or leaves with OthersAtWork.
        """
        if self._splits is None:
            corpus = self._corpus()
            if not corpus.sources:
                raise no_train_files()
            checks = (self._check_tokens, partial(self.trained_text.take, corpus))
            cache = (corpus, self.text_tokenizer, self.cache_dir)
            splits = prepare_tokens(*cache, *checks, drop_repeated=self.drop_repeated, others=others)
            if corpus.train_files:
                self._check_tokens(splits["train"].n_tokens)
            self._splits = splits
            losing = [split for split in splits.values() if not self.keeps_text(split.name)]
            if losing:
                rank_zero_only(_log.warning)("warning: %s", loss_warning(losing))
        return self._splits

    def _check_tokens(self, n_tokens: int) -> None:
        if n_tokens == 0:
            raise UserError(f"data.train_files={self.train_files} is empty; give files with text")
        if n_tokens < self.seq_len + 1:
            needs = f"data.seq_len={self.seq_len} needs {self.seq_len + 1} training tokens"
            remedy = "lower data.seq_len or add text to data.train_files"
            raise UserError(f"{needs}, but there are {n_tokens}; {remedy}")

    def keeps_text(self, name: str) -> bool:
        """Tells whether a split's tokens say all that its text says; else its bits per byte mean nothing."""
        split = self._split(name)
        lost_share = split.lost_share if split else 0
        return self.text_tokenizer.keeps_text if lost_share is None else lost_share == 0

    def split_counts(self, name: str) -> tuple[int, int]:
        """Counts tokens and UTF-8 bytes of a split: their ratio turns nats per token into bits per byte."""
        split = self._split(name)
        return (split.n_tokens, split.n_bytes) if split else (0, 0)

    def beginnings(self, name: str, count: int) -> list[str]:
        """Returns the first words of up to so many documents of a split, from all over it."""
        if (split := self._split(name)) is None:
            return []
        chosen = np.unique(np.linspace(0, split.n_documents, count, endpoint=False).astype(int))
        opening, decode = split.opening, self.text_tokenizer.decode
        return [first_words(decode(opening(document, OPENING))) for document in chosen.tolist()]

    def _split(self, name: str) -> TokenSplit | None:
        """Finds a split; without test files the validation text is the test text."""
        splits = self.prepare()
        return splits.get(name, splits.get("val") if name == "test" else None)

    def _corpus(self) -> Corpus:
        patterns = {name: getattr(self, name) for name in ("train_files", "val_files", "test_files")}
        settings = ("val_fraction", "seed", "text_key", "document_separator")
        return Corpus.find(patterns, **{name: getattr(self, name) for name in settings})

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
            if self.train_files is None:
                raise no_train_files()
            self._order.start()
        elif self._split({"validate": "val"}.get(stage, stage)) is None:
            option = f"data.val_fraction={self.val_fraction}"
            raise UserError(f"{option} leaves no text to {stage} on; raise it or give data.val_files")

    @override
    def train_dataloader(self) -> DataLoader[TokenBatch]:
        split = self._split("train")
        if split is None:
            raise no_train_files()
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        start = self._order.restored.consumed_samples
        dataset = self._window_batches(split, seed=self.seed, start=start, accumulate=accumulate)
        if self.trainer is None:
            return self._whole_loader(dataset)
        self._order.take_epochs(dataset.epochs)
        return self._loader(dataset, self._order.batches)

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
        split = self._split(name)
        return [] if split is None else self._whole_loader(self._window_batches(split))

    def _whole_loader(self, dataset: WindowBatches) -> DataLoader[TokenBatch]:
        batches = EpochBatches(range(dataset.epochs.first_batches), dataset.epochs.epoch_batches)
        return self._loader(dataset, lambda: batches)

    def _window_batches(self, split: TokenSplit, **order: int) -> WindowBatches:
        rank, ranks = self._rank_and_ranks()
        global_batch = self.batch_size * ranks
        epochs = Epochs(n_tokens=split.n_tokens, seq_len=self.seq_len, global_batch=global_batch, **order)
        return WindowBatches(
            split=split,
            epochs=epochs,
            rank=rank,
            ranks=ranks,
            document_mask=self.document_mask,
            vocab_size=self.vocab_size,
        )

    def _loader(self, dataset: WindowBatches, batches: Callable[[], EpochBatches]) -> DataLoader[TokenBatch]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return batch_loader(dataset, batches, num_workers=self.num_workers, pin_memory=on_gpu)

    def _rank_and_ranks(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else rank_and_ranks(self.trainer)

    # ---- the position in the training order

    @property
    def consumed_samples(self) -> int:
        """Counts the windows trained on so far, over all ranks and epochs."""
        return self._order.position().consumed_samples

    def close_epoch_first(self) -> None:
        """Resumes a checkpoint saved when all of an epoch was trained and Lightning had not closed it."""
        self._order.close_epoch_first()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **self._order.position()._asdict(),
            "settings": settings_of_a_run(self),
            "tokenizer": self.text_tokenizer.state,
            "text": self.trained_text.described,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.trainer is None or self.trainer.state.fn == "fit":
            refuse_other_settings(self, state_dict["settings"])
            self.trained_text.resume(state_dict)
        own, saved = self._text_tokenizer, state_dict["tokenizer"]
        self._text_tokenizer = tokenizer_of_checkpoint(own, saved, self.tokenizer)
        self._order.restore(Position(*(state_dict[name] for name in Position._fields)))
