"""Tokenizers from strangers never run code, and nothing reaches the network unless a hub's name is given."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt_lightning.__main__ import main
from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.data.tokenizer import load_tokenizer
from gpt_lightning.huggingface.importing import import_model
from tests.huggingface.gpt2_folders import write_gpt2

Config = Callable[..., Path]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every attempt to reach another machine, which fails."""
    attempts: list[object] = []

    def refuse(*args: object, **options: object) -> None:
        attempts.append(args)
        raise OSError("no network in this test")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    return attempts


CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Own: pass\n"


def write_tokenizer(folder: Path, *, fast: bool, vocabulary: bool) -> Path:
    """A folder whose every file asks for the code beside it."""
    if fast:
        load_tokenizer("bytes").save(folder)
    folder.mkdir(exist_ok=True)
    for name in ("tokenization_own", "configuration_own", "modeling_own"):
        (folder / f"{name}.py").write_text(CODE)
    own = "tokenization_own.Own"
    auto = {"AutoTokenizer": [own, own], "AutoConfig": "configuration_own.Own"}
    asking = {"auto_map": auto, "tokenizer_class": "Own", "model_type": "own", "trust_remote_code": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**asking, "eos_token": "<|endoftext|>"}))
    (folder / "config.json").write_text(json.dumps(asking))
    if vocabulary:
        (folder / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nthe\ncat\n")
    return folder


def test_code_in_a_tokenizer_folder_does_not_run(connections: list[object], tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "fast", fast=True, vocabulary=False)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    for vocabulary in (False, True):
        folder = write_tokenizer(tmp_path / f"slow{vocabulary}", fast=False, vocabulary=vocabulary)
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_tokenizer(str(folder))
    assert not list(tmp_path.rglob("ran")) and not connections


@pytest.mark.parametrize("name", ["./none", "none/", "/none/at/all", "a/b/c", "../none", "texts/none", "~/x"])
def test_what_could_be_a_path_does_not_reach_the_network(
    name: str, connections: list[object], tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    with pytest.raises(ValueError, match="is not a folder"):
        load_tokenizer(name)
    assert not connections


def test_a_name_on_the_hub_does(connections: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt_lightning.data.hub.getproxies", lambda: {})
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer("nobody/no-such-tokenizer")
    assert connections


def test_a_model_on_the_hub_is_asked_for_and_one_in_a_folder_is_not(
    connections: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt_lightning.data.hub.getproxies", lambda: {})
    write_gpt2(tmp_path / "gpt2")
    for name in ("gpt2", "./gpt2", str(tmp_path / "gpt2")):
        import_model(name, "NAME")
    for name in ("./none", "gpt2/none", "none/"):
        with pytest.raises(ValueError, match="is not there"):
            import_model(name, "NAME")
    assert not connections
    with pytest.raises(ValueError, match="cannot be had from the hub .it cannot be reached."):
        import_model("nobody/no-such-model", "NAME")
    assert connections


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300", "folder"])
def test_no_verb_reaches_the_network(
    tokenizer: str, tiny_config: Config, connections: list[object], tmp_path: Path
) -> None:
    write_tokenizer(tmp_path / "folder", fast=True, vocabulary=False)
    config = str(tiny_config(data={"tokenizer": tokenizer}))
    main(["fit", "--config", config])
    for verb in ("validate", "test", "predict"):
        main([verb, "--ckpt_path", "checkpoints/tiny/last.ckpt"])
    assert not connections and not list(tmp_path.rglob("ran"))


@pytest.mark.slow
def test_a_checkpoint_is_enough_where_its_tokenizer_came_from_the_hub(
    tiny_config: Config, connections: list[object], tmp_path: Path
) -> None:
    main(["fit", "--config", str(tiny_config(data={"tokenizer": "bytes"}))])
    checkpoint = dict(Checkpoint.open(Path("checkpoints/tiny/last.ckpt")).contents)
    data = checkpoint["TextDataModule"]
    checkpoint["TextDataModule"] = {**data, "settings": {**data["settings"], "tokenizer": "owner/name"}}
    torch.save(checkpoint, "checkpoints/tiny/hub.ckpt")
    config = str(tiny_config(data={"tokenizer": "owner/name"}))
    for verb in ("validate", "test", "predict"):
        main([verb, "--config", config, "--ckpt_path", "checkpoints/tiny/hub.ckpt"])
    main(["fit", "--config", config, "--ckpt_path", "checkpoints/tiny/hub.ckpt", "--trainer.max_steps", "7"])
    assert not connections
