"""TextDataModule: options, loaders and prompts, without training."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from gpt_lightning.data import block_digests
from gpt_lightning.data.block_digests import write_digests
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.loader import EpochBatches, TokenBatch, batch_loader
from gpt_lightning.data.tokenizer import TextTokenizer, load_tokenizer
from gpt_lightning.exit_codes import UserError


class RankOf:
    """What the datamodule asks of a trainer on one of several data-parallel ranks."""

    def __init__(self, rank: int, ranks: int) -> None:
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        self.strategy, self.fit_loop = trainer.strategy, trainer.fit_loop
        self.accumulate_grad_batches, self.overfit_batches = 1, 0.0
        self.num_training_batches = trainer.num_training_batches
        self.limit_train_batches, self.reload_dataloaders_every_n_epochs = 1.0, 0
        self.distributed_sampler_kwargs = {"num_replicas": ranks, "rank": rank}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """40 documents, each of a letter of its own."""
    rows = [{"text": chr(0x41 + index) * (9 + index % 7)} for index in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path / "a.jsonl"


def datamodule(source: Path, rank: int = 0, ranks: int = 1, **options: Any) -> TextDataModule:
    options = {"seq_len": 7, "batch_size": 4, "tokenizer": "bytes", "val_fraction": 0.2, **options}
    made = TextDataModule(train_files=str(source), cache_dir=str(source.parent / "cache"), **options)
    made.trainer = RankOf(rank, ranks) if ranks > 1 else None  # type: ignore[assignment]
    return made


def scored(batches: list[TokenBatch]) -> Counter[int]:
    return Counter(int(target) for batch in batches for target in batch.targets.flatten() if target != -100)


def test_an_epoch_trains_on_every_training_token_once_and_on_no_other(source: Path) -> None:
    data = datamodule(source)
    splits = data.prepare()
    held_out = set(splits["val"].tokens.tolist()) - {256}
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) > 5
    assert scored(batches) == Counter(splits["train"].tokens.tolist())
    assert held_out and not held_out & set(scored(batches))
    assert not held_out & {int(index) for batch in batches for index in batch.input_ids.flatten()}
    assert all(batch.input_ids.shape == batch.targets.shape == (4, 7) for batch in batches)
    assert all(batch.input_ids.dtype == torch.int64 and batch.document_ids is None for batch in batches)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_batches_do_not_depend_on_ranks_or_workers(source: Path, ranks: int, num_workers: int) -> None:
    expected = [
        sorted(row.tolist() for row in batch.targets if (row != -100).any())
        for batch in datamodule(source, batch_size=8).train_dataloader()
    ]
    loaders = [
        datamodule(source, rank, ranks, batch_size=8 // ranks, num_workers=num_workers).train_dataloader()
        for rank in range(ranks)
    ]
    if num_workers and ranks == 4:
        loaders = loaders[:1]
    assert len({len(loader) for loader in loaders}) == 1
    for shares, whole in zip(zip(*loaders, strict=True), expected, strict=True):
        rows = sorted(row.tolist() for share in shares for row in share.targets if (row != -100).any())
        assert rows == whole if len(loaders) == ranks else all(row in whole for row in rows)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_scores_every_held_out_token_once(source: Path, batch_size: int, ranks: int) -> None:
    modules = [datamodule(source, rank, ranks, batch_size=batch_size) for rank in range(ranks)]
    shares = [list(module.val_dataloader()) for module in modules]
    data = datamodule(source)
    assert len({len(share) for share in shares}) == 1
    assert scored(sum(shares, [])) == Counter(data.prepare()["val"].tokens.tolist())
    assert data.split_counts("val")[0] == sum(scored(sum(shares, [])).values())


def test_document_mask_separates_documents(source: Path) -> None:
    for batch in datamodule(source, document_mask=True).train_dataloader():
        assert batch.document_ids is not None
        for targets, ids in zip(batch.targets.tolist(), batch.document_ids.tolist(), strict=True):
            letters: dict[int, set[int]] = {}
            for target, index in zip(targets, ids, strict=True):
                letters.setdefault(index, set()).add(target)
            # Every document is one letter and its eos.
            assert all(len(letter - {256}) <= 1 for letter in letters.values())


def test_bits_per_byte_counts(source: Path) -> None:
    data = datamodule(source)
    n_tokens, n_bytes = data.split_counts("train")
    split = data.prepare()["train"]
    assert n_bytes == n_tokens - split.n_documents  # a byte a token, and an eos a document
    assert data.split_counts("test") == data.split_counts("val")
    assert datamodule(source, val_fraction=0.0).split_counts("val") == (0, 0)


def test_absent_splits_have_no_loader(source: Path) -> None:
    data = datamodule(source, val_fraction=0.0)
    assert data.val_dataloader() == [] and data.test_dataloader() == []
    data.setup("fit")
    for stage in ("validate", "test"):
        with pytest.raises(ValueError, match=f"data.val_fraction=0.0 leaves no text to {stage} on; raise"):
            data.setup(stage)
    test = datamodule(source, val_fraction=0.0, test_files=str(write(source.parent / "t.txt", "xyz")))
    assert scored(list(test.test_dataloader())) == Counter([*b"xyz", 256])


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_validation_needs_no_training_text(source: Path) -> None:
    data = TextDataModule(
        val_files=str(source), tokenizer="bytes", seq_len=5, cache_dir=str(source.parent / "cache")
    )
    data.setup("validate")
    assert sum(scored(list(data.val_dataloader())).values()) == data.split_counts("val")[0] > 0
    with pytest.raises(ValueError, match="data.train_files=null names no text; give"):
        data.setup("fit")


def test_options_are_checked_at_once() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"val_fraction": 1.5}, r"data.val_fraction=1.5 is not in \[0, 1\); choose a fraction such as 0.1"),
        ({"val_fraction": -0.1}, r"data.val_fraction=-0.1 is not in"),
        ({"seq_len": 0}, "data.seq_len=0 is below 1; "),
        ({"batch_size": 0}, "data.batch_size=0 is below 1; "),
        ({"num_workers": -1}, "data.num_workers=-1 is below 0; "),
        ({"document_separator": ""}, "data.document_separator='' separates nothing; "),
        ({"tokenizer": "bpe:1"}, "data.tokenizer=bpe:1 asks for "),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            TextDataModule(**options)


def test_corpus_errors_name_the_option(source: Path) -> None:
    with pytest.raises(ValueError, match="data.train_files=null names no text; give"):
        TextDataModule().prepare()
    with pytest.raises(ValueError, match="data.train_files=null names no text; give"):
        TextDataModule().vocab_size
    with pytest.raises(ValueError, match=r"data.val_files=.*a.jsonl is also in data.train_files; remove"):
        datamodule(source, val_files=[str(source)]).prepare()
    n_tokens = datamodule(source).split_counts("train")[0]
    datamodule(source, seq_len=n_tokens - 1).prepare()
    message = f"data.seq_len={n_tokens} needs {n_tokens + 1} training tokens, .* {n_tokens}; lower"
    with pytest.raises(ValueError, match=message):
        datamodule(source, seq_len=n_tokens).prepare()


def test_vocabulary_follows_the_tokenizer_in_use(source: Path) -> None:
    data = datamodule(source, tokenizer="bpe:270")
    assert data.vocab_size == data.text_tokenizer.vocab_size <= 270
    data.use_tokenizer(load_tokenizer("bytes"))
    assert data.vocab_size == 257 and data.prepare()["train"].tokens.max() == 256


def test_prediction_touches_no_corpus() -> None:
    data = TextDataModule(train_files="/none.txt", prompts=["ab", "", "c"], batch_size=2)
    data.use_tokenizer(load_tokenizer("bytes"))
    data.setup("predict")
    (share,) = data.predict_dataloader()
    assert share.indices == [0, 1, 2]
    assert share.token_ids == [[97, 98], [256], [99]]
    assert share.prompts == ["ab", "", "c"]


def test_state_carries_position_and_tokenizer(source: Path) -> None:
    data = datamodule(source)
    state = data.state_dict()
    assert state["consumed_samples"] == 0
    assert TextTokenizer.from_dict(state["tokenizer"]).fingerprint == data.text_tokenizer.fingerprint
    whole = [batch.targets.tolist() for batch in data.train_dataloader()]
    later = datamodule(source)
    later.load_state_dict({**state, "consumed_samples": 12, "batches": 3, "epoch_batches": 3})
    assert later.consumed_samples == 12
    assert [batch.targets.tolist() for batch in later.train_dataloader()] == whole[3:]
    assert len(later.train_dataloader()) == len(whole)
    other = datamodule(source, tokenizer="bpe:260")
    assert other.vocab_size > 0
    with pytest.raises(ValueError, match="data.tokenizer=bpe:260 on this text is not the checkpoint's"):
        other.load_state_dict(state)


@pytest.mark.parametrize("option, value", [("seed", 7), ("val_fraction", 0.3), ("seq_len", 5)])
def test_a_run_goes_on_with_its_order_and_what_it_held_out(
    option: str, value: Any, source: Path
) -> None:
    data = datamodule(source)
    data.setup("fit")
    datamodule(source, batch_size=2).load_state_dict(data.state_dict())
    with pytest.raises(UserError, match=f"data.{option}={value} contradicts the checkpoint, which has"):
        datamodule(source, **{option: value}).load_state_dict(data.state_dict())


def test_a_token_that_no_tokenizer_gave_is_told_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text to be spoilt " * 9)
    settings = {"train_files": str(tmp_path / "a.txt"), "tokenizer": "bytes", "seq_len": 8}
    data = TextDataModule(**settings, cache_dir=str(tmp_path / "cache"), val_fraction=0.0)
    folder = data.prepare()["train"].folder
    tokens = folder / "train.tokens.bin"
    tokens.write_bytes(b"\xff\xff" * (tokens.stat().st_size // 2))
    write_digests(tokens)  # as if it had been written so
    fresh = TextDataModule(**settings, cache_dir=str(tmp_path / "cache"), val_fraction=0.0)
    with pytest.raises(ValueError, match=f"{folder} holds token id 65535, and the tokenizer has 257"):
        next(iter(fresh.train_dataloader()))


@pytest.mark.parametrize("document_mask", [False, True])
def test_damage_that_opening_overlooks_is_told_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document_mask: bool
) -> None:
    monkeypatch.setattr(block_digests, "BLOCK_BYTES", 64)
    monkeypatch.setattr(block_digests, "_OPENED_BLOCKS", 1)
    (tmp_path / "a.txt").write_text("some text, " * 200)
    settings = {"train_files": str(tmp_path / "a.txt"), "tokenizer": "bytes", "seq_len": 8}
    settings |= {"document_separator": ",", "cache_dir": str(tmp_path / "cache")}
    folder = TextDataModule(**settings, val_fraction=0.0).prepare()["train"].folder
    damaged = folder / ("train.documents.bin" if document_mask else "train.tokens.bin")
    content = bytearray(damaged.read_bytes())
    content[520] ^= 4
    damaged.write_bytes(content)
    data = TextDataModule(**settings, val_fraction=0.0, document_mask=document_mask)
    message = f"^data.cache_dir: {damaged} is not as it was written; remove {folder}, and it is built anew$"
    with pytest.raises(ValueError, match=message):
        list(data.train_dataloader())


def test_what_a_worker_refuses_is_told_in_its_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(self: DataLoader[Any]) -> Iterator[Any]:
        try:
            raise UserError("data.cache_dir: UserError: is damaged; remove it")
        except UserError:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()  # as PyTorch's own does
        yield

    monkeypatch.setattr(DataLoader, "__iter__", begin)
    loader = batch_loader([1, 2], lambda: EpochBatches(range(2), 2), num_workers=1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="^data.cache_dir: UserError: is damaged; remove it$"):
        next(iter(loader))


def test_beginnings_are_the_first_words_of_held_out_documents(tmp_path: Path) -> None:
    texts = ["我要为我为忍心，我觉得我的心要生存在一处，但也许可以得到好。", "To be, or not to be, that is the question"]
    (tmp_path / "a.txt").write_text("never held out, being the training text " * 9)
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*texts, "Ay."]))
    data = datamodule(tmp_path / "a.txt", val_files=str(tmp_path / "b.jsonl"))
    assert data.beginnings("val", 3) == ["我要为我为忍心，我觉得我的心要生存在一处，"[:21], "To be, or not to be,", "Ay."]
    assert data.beginnings("val", 1) == data.beginnings("val", 3)[:1]
    assert data.beginnings("val", 9) == data.beginnings("val", 3)
    assert datamodule(tmp_path / "a.txt", val_fraction=0).beginnings("val", 2) == []
