"""Mixtures of texts: options, batches and what a checkpoint keeps, without training."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning.checkpoint.contents import _is_mixture
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.loader import TokenBatch
from gpt_lightning.exit_codes import UserError
from tests.data.test_datamodule import RankOf, scored

WEIGHTS: dict[str, Any] = {"latin": 3, "greek": 1}
FIRST = {"latin": 0x41, "greek": 0x391}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two texts of documents, each of a letter of its own; the bytes tell them apart."""
    for name, first in FIRST.items():
        rows = [{"text": chr(first + index) * (9 + index % 7)} for index in range(24)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def sources(folder: Path, **weights: Any) -> list[dict[str, Any]]:
    return [
        {"name": name, "files": str(folder / f"{name}.jsonl"), "weight": weight}
        for name, weight in (weights or WEIGHTS).items()
    ]


def datamodule(folder: Path, rank: int = 0, ranks: int = 1, **options: Any) -> TextDataModule:
    options = {"seq_len": 7, "batch_size": 8, "tokenizer": "bytes", "val_fraction": 0.2, **options}
    options = {"mixture": sources(folder), **options}
    made = TextDataModule(cache_dir=str(folder / "cache"), **options)
    made.trainer = RankOf(rank, ranks) if ranks > 1 else None  # type: ignore[assignment]
    return made


def source_of(row: torch.Tensor) -> str:
    """Greek letters have two bytes, of which the first is above ASCII."""
    return "greek" if ((row > 127) & (row < 256)).any() else "latin"


def test_each_batch_has_the_share_of_its_weights(folder: Path) -> None:
    batches = list(datamodule(folder).train_dataloader())
    assert len(batches) > 8
    for batch in batches[:-1]:
        assert Counter(map(source_of, batch.targets)) == {"latin": 6, "greek": 2}
        assert batch.source is None and batch.step_tokens == int(batch.scored())


def test_no_held_out_token_of_any_source_is_trained_on(folder: Path) -> None:
    data = datamodule(folder)
    splits = data.prepare()
    assert [*splits] == ["train/latin", "val/latin", "train/greek", "val/greek"]
    for name in FIRST:
        trained, held_out = (
            {text.strip() for text in texts_of(splits[f"{split}/{name}"])} for split in ("train", "val")
        )
        assert trained and held_out and not trained & held_out


def texts_of(split: Any) -> list[str]:
    text = bytes(token if token < 256 else 10 for token in split.tokens.tolist()).decode()
    return text.splitlines()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_batches_do_not_depend_on_ranks_or_workers(folder: Path, ranks: int, num_workers: int) -> None:
    options = {"document_mask": True}
    expected = [batch for batch in datamodule(folder, **options).train_dataloader()]
    each = {"batch_size": 8 // ranks, "num_workers": num_workers, **options}
    loaders = [iter(datamodule(folder, rank, ranks, **each).train_dataloader()) for rank in range(ranks)]
    for batch in expected[:9]:
        parts = [next(loader) for loader in loaders]
        for name in ("input_ids", "targets", "document_ids", "sample_ids"):
            rows = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
            assert rows.equal(getattr(batch, name))
        assert {part.step_tokens for part in parts} == {batch.step_tokens}


def test_document_masks_are_those_of_each_source(folder: Path) -> None:
    """Between two eos is one document: counted here by hand from the ids that a row holds."""
    for batch in datamodule(folder, document_mask=True).train_dataloader():
        for row in range(8):
            targets, documents = batch.targets[row], batch.document_ids[row]
            full = int((targets != -100).sum())
            number, expected = 0, []
            for column in range(full):  # a target after an eos is of the next document
                if column and batch.input_ids[row, column] == 256:
                    number += 1
                expected.append(number)
            assert documents[:full].tolist() == expected


def test_held_out_batches_have_one_source_each_and_every_token_once(folder: Path) -> None:
    data = datamodule(folder)
    splits = data.prepare()
    batches: list[TokenBatch] = list(data.val_dataloader())
    assert {batch.source for batch in batches[:2]} == {*FIRST}, "a part of them has some of each"
    for name in FIRST:
        own = [batch for batch in batches if batch.source == name]
        assert scored(own) == Counter(splits[f"val/{name}"].tokens.tolist())
    alone = datamodule(folder, mixture=None, train_files=str(folder / "greek.jsonl"))
    for one, other in zip((b for b in batches if b.source == "greek"), alone.val_dataloader(), strict=True):
        assert one.targets.equal(other.targets) and one.input_ids.equal(other.input_ids)
        assert other.source is None


def test_a_tokenizer_is_trained_on_all_sources(folder: Path) -> None:
    trained = datamodule(folder, tokenizer="bpe:400").text_tokenizer
    alone = datamodule(folder, tokenizer="bpe:400", mixture=sources(folder, latin=1)).text_tokenizer
    for first, share in ((FIRST["greek"], 0.6), (FIRST["latin"], 1.2)):
        text = "".join(chr(first + index) * 9 for index in range(24))
        assert len(trained.encode(text)) < share * len(alone.encode(text))


def state_of(data: TextDataModule) -> dict[str, Any]:
    data.setup("fit")
    data.train_dataloader()
    return data.state_dict()


def test_a_checkpoint_keeps_where_weights_change(folder: Path) -> None:
    weights: Any = {"latin": {0: 3, 4: 1}, "greek": 1}
    state = state_of(datamodule(folder, mixture=sources(folder, **weights)))
    assert state["mixture"]["steps"] == [0, 4] and state["mixture"]["starts"] == [0, 32]
    assert state["mixture"]["weights"] == {"latin": [3, 1], "greek": [1, 1]}
    assert _is_mixture(json.loads(json.dumps(state["mixture"])))
    other = datamodule(folder, mixture=sources(folder, **weights), batch_size=4)
    other.setup("fit")
    other.load_state_dict(state)
    other.train_dataloader()
    assert other.state_dict()["mixture"] == state["mixture"]
    assert not _is_mixture({**state["mixture"], "weights": {"latin": [3], "greek": [1, 1]}})


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"latin": 2, "greek": 1}, "the weight of latin is 2, and in the checkpoint 3; leave it as it was"),
        ({"latin": {0: 3, 9: 1}, "greek": 1}, "the weight of latin is {0: 3, 9: 1}, and in the checkpoint 3"),
        ({"greek": 1, "latin": 3}, "has the sources greek, latin, and the checkpoint's run has latin, greek"),
        ({"latin": 3}, "latin, greek; leave them as they were, or train anew, from it by --init_from"),
    ],
)
def test_a_run_goes_on_with_its_own_mixture_alone(folder: Path, weights: Any, message: str) -> None:
    state = state_of(datamodule(folder))
    with pytest.raises(UserError, match=message):
        datamodule(folder, mixture=sources(folder, **weights)).load_state_dict(state)


def test_a_run_goes_on_with_the_text_of_each_source(folder: Path) -> None:
    state = state_of(datamodule(folder))
    same = datamodule(folder)
    same.load_state_dict(state)
    same.prepare()
    plain = datamodule(folder, mixture=None, train_files=str(folder / "latin.jsonl"))
    with pytest.raises(UserError, match="trains on data.train_files, and that of the checkpoint on data.mix"):
        plain.load_state_dict(state)
    with pytest.raises(UserError, match="trains on data.mixture, and that of the checkpoint on data.train"):
        datamodule(folder).load_state_dict(state_of(plain))
    (folder / "greek.jsonl").write_text('{"text": "another text"}\n' * 20)
    changed = datamodule(folder)
    changed.load_state_dict(state)
    with pytest.raises(UserError, match="greek.jsonl has changed since the checkpoint"):
        changed.prepare()
    assert "greek.jsonl has changed" in (changed.text_warning(state, "validate") or "")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_files": "a.txt"}, "data.train_files stands beside data.mixture"),
        ({"val_files": "a.txt"}, "data.val_files stands beside data.mixture, whose sources have val_files"),
        ({"mixture": []}, r"data.mixture=\[\] names no source"),
        ({"weight": -1}, "the weight of latin is -1, which is no share; give 0 or more"),
        ({"weight": float("nan")}, "the weight of latin is nan, which is no share"),
        ({"weight": {5: 1}}, r"the weights of latin are for the steps \[5\]; begin with the one at step 0"),
        ({"weight": 1e-6}, "the weight 1e-06 of latin from step 0 on is under one 65,536th of all"),
        ({"name": "a/b"}, "the name 'a/b' does not do"),
        ({"name": "greek"}, "names greek 2 times"),
        ({"document_separator": ""}, "document_separator='' of latin separates nothing"),
    ],
)
def test_bad_mixtures_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    given = sources(folder)
    options = {name: changes[name] for name in changes.keys() & {"train_files", "val_files", "mixture"}}
    given[0] |= {name: value for name, value in changes.items() if name not in options}
    with pytest.raises(UserError, match=message):
        datamodule(folder, **{"mixture": given, **options})


def test_all_weights_0_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="all weights are 0 from step 3 on; raise one"):
        datamodule(folder, mixture=sources(folder, latin={0: 1, 3: 0}, greek=0))


@pytest.mark.parametrize("option", ["files", "val_files"])
def test_the_same_text_in_two_sources_is_refused(folder: Path, option: str) -> None:
    copy = folder / "copy.jsonl"
    copy.write_bytes((folder / "latin.jsonl").read_bytes())
    given = sources(folder)
    given[1][option] = str(copy)
    with pytest.raises(UserError, match="copy.jsonl of greek is the same text as .*latin.jsonl of latin"):
        datamodule(folder, mixture=given).prepare()


def test_an_absent_file_is_named_with_its_source(folder: Path) -> None:
    given = sources(folder)
    given[1]["files"] = str(folder / "none.txt")
    with pytest.raises(UserError, match="data.mixture: of greek files=.*none.txt does not exist"):
        datamodule(folder, mixture=given).prepare()
