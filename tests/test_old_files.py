"""What version 0.1 wrote, before the files of the package moved, is still read, resumed and exported.

`tests/old_files` holds a checkpoint, a sharded one (of two tensor-parallel ranks) and a token cache of runs
by old.yaml on `conftest.write_corpus`, saved at step 5 of 10; the losses below are those at which they ended.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from gpt_lightning.__main__ import main
from gpt_lightning.checkpoint import load_model
from gpt_lightning.data.datamodule import TextDataModule
from tests.conftest import write_corpus
from tests.faults.harness import run

OLD = Path(__file__).parent / "old_files"
ONE_PEER = ("--trainer.strategy.tensor_parallel_size", "1")
LOSSES = {"file": 4.526679673695673, "folder": 4.504055902838163}
STRATEGY = ("--trainer.strategy", "gpt_lightning.TensorParallelDDPStrategy", *ONE_PEER)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder with the old files in it."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus.jsonl")
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    for name in LOSSES:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / f"{name}.ckpt").rename(tmp_path / "checkpoints" / name / "step000005.ckpt")
    return tmp_path


def test_an_old_token_cache_is_fresh(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_model(folder / "checkpoints" / "file" / "step000005.ckpt")[1]
    settings = {
        **{"train_files": [str(folder / "corpus.jsonl")], "val_files": [], "test_files": []},
        **{"val_fraction": 0.1, "seed": 42, "text_key": "text", "document_separator": None},
        "tokenizer": tokenizer.fingerprint,
    }
    key = json.dumps([1, settings, settings["train_files"]], sort_keys=True).encode()
    cache = folder / "cache" / f"tokens-{hashlib.sha256(key).hexdigest()[:16]}"
    shutil.copytree(folder / "tokens", cache)
    data = TextDataModule(train_files=["corpus.jsonl"], tokenizer="bpe:300", seq_len=16, cache_dir="cache")
    data.use_tokenizer(tokenizer)
    with caplog.at_level("INFO", logger="gpt_lightning"):
        split = data.prepare()["train"]
    assert split.folder == cache and not caplog.records
    read = np.fromfile(folder / "tokens" / "train.tokens.bin", dtype=np.uint16)
    assert split.tokens.tolist() == read.tolist()
    documents = [json.loads(line)["text"] for line in Path("corpus.jsonl").read_text().splitlines()]
    assert tokenizer.decode(read[: split.document_starts[1] - 1].tolist()) in documents


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [("file", ()), ("file", STRATEGY), ("folder", STRATEGY)],
    ids=["file", "file by our strategy", "folder on one rank"],
)
def test_an_old_run_is_resumed(name: str, options: tuple[str, ...], folder: Path) -> None:
    path = f"checkpoints/{name}/step000005.ckpt"
    code, output = run(
        ["fit", "--config", "old.yaml", "--run_name", name, "--ckpt_path", path, *options], folder
    )
    assert code == 0, output
    ended = torch.load(folder / "checkpoints" / name / "last.ckpt", weights_only=True)
    assert ended["global_step"] == 10
    # The folder's run had two ranks, whose attention dropped other numbers than one does.
    tolerance = 1e-5 if name == "file" else 0.03
    assert ended["last_validation"]["loss"] == pytest.approx(LOSSES[name], abs=tolerance)


def test_an_old_sharded_checkpoint_becomes_a_file(folder: Path) -> None:
    old = folder / "checkpoints" / "folder" / "step000005.ckpt"
    main(["consolidate", "--ckpt_path", str(old), "--output", "whole.ckpt"])
    whole = torch.load("whole.ckpt", weights_only=True)
    dcp_to_torch_save(old, folder / "plain.pt")  # PyTorch's own reader
    plain = torch.load("plain.pt", weights_only=False)
    weights = {key.removeprefix("state_dict/"): value for key, value in plain.items() if "state_dict/" in key}
    assert weights and all(torch.equal(whole["state_dict"][name], value) for name, value in weights.items())
    moments = whole["optimizer_states"][0]["state"]
    assert torch.equal(moments[0]["exp_avg"], plain["optimizer_states/0/0/exp_avg"])


@pytest.mark.parametrize("name", LOSSES)
def test_an_old_checkpoint_is_exported(name: str, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = folder / "checkpoints" / name / "step000005.ckpt"
    main(["export-hf", str(path), "exported"])
    theirs = transformers.GPT2LMHeadModel.from_pretrained("exported")
    if name == "folder":
        main(["consolidate", "--ckpt_path", str(path), "--output", "whole.ckpt"])
        path = folder / "whole.ckpt"
    ours, _ = load_model(path)
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
