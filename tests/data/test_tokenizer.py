"""Tokenizers: any string round-trips, special tokens in text are text, and files open elsewhere."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.tokenizer import (
    TextTokenizer,
    default_vocab_size,
    is_trained_here,
    load_tokenizer,
    load_tokenizer_folder,
    requested_vocab_size,
    train_bpe,
)

TEXT = "The cat doesn't sit on 42 mats.\nIt naps; 鲁迅写了《呐喊》。 <|endoftext|> is text.\n"


@pytest.fixture(scope="module")
def bpe() -> TextTokenizer:
    return train_bpe([TEXT] * 5, 300)


def random_strings() -> list[str]:
    draw = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000), (9, 14)]
    return [
        "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(60)))
        for _ in range(300)
    ]


@pytest.mark.parametrize("name", ["bpe", "bytes"])
def test_any_string_round_trips(bpe: TextTokenizer, name: str) -> None:
    tokenizer = bpe if name == "bpe" else load_tokenizer("bytes")
    strings = ["👩‍👩‍👧‍👦\u200d\ufffd\ufeff", "\x00\x1c\x85\r\n\t", " lead", "trail ", "", TEXT]
    strings += random_strings()
    for string, ids in zip(strings, tokenizer.encode_batch(strings), strict=True):
        assert tokenizer.decode(ids) == string
        assert ids == tokenizer.encode(string)
        assert tokenizer.eos_token_id not in ids
        assert all(0 <= index < tokenizer.vocab_size for index in ids)


def test_bytes_are_their_own_ids() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (257, 256)


def test_trained_bpe_has_the_size_asked_for_and_shortens_text(bpe: TextTokenizer) -> None:
    assert bpe.vocab_size == 300
    assert len(bpe.encode(TEXT)) < 0.8 * len(TEXT.encode())
    assert train_bpe([TEXT] * 5, 300).fingerprint == bpe.fingerprint
    assert train_bpe([TEXT] * 5, 301).fingerprint != bpe.fingerprint


def test_decoding_drops_bytes_that_make_no_character(bpe: TextTokenizer) -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode("a🙂b")
    assert tokenizer.decode(ids[:3]) == "a"
    assert tokenizer.decode(ids[2:]) == "b"
    assert tokenizer.decode([*ids, 256, *ids]) == "a🙂ba🙂b"
    assert bpe.decode([bpe.eos_token_id]) == ""


def test_special_tokens_in_text_are_plain_text_after_every_reload(bpe: TextTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    copies = [
        bpe,
        TextTokenizer.from_dict(bpe.state),
        pickle.loads(pickle.dumps(bpe)),
        load_tokenizer(str(tmp_path)),
    ]
    for copy in copies:
        ids = copy.encode("a<|endoftext|>b")
        assert copy.eos_token_id not in ids and copy.decode(ids) == "a<|endoftext|>b"
        assert copy.fingerprint == bpe.fingerprint
    assert all(isinstance(value, str) for value in bpe.state.values())


def test_saved_folder_opens_in_transformers(bpe: TextTokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    bpe.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    plain = "The cat's 42 mats — 鲁迅\n\n  naps"
    assert theirs(plain, add_special_tokens=False)["input_ids"] == bpe.encode(plain)
    assert theirs.decode(bpe.encode(plain)) == plain
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|endoftext|>", bpe.eos_token_id)


def write_vocabulary_and_merges(tokenizer: TextTokenizer, folder: Path) -> None:
    model = json.loads(tokenizer.state["tokenizer_json"])["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")


def test_vocabulary_and_merges_files_give_the_same_ids(bpe: TextTokenizer, tmp_path: Path) -> None:
    write_vocabulary_and_merges(bpe, tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode(TEXT) == bpe.encode(TEXT)
    assert loaded.eos_token_id == bpe.eos_token_id


ADDED = {"<|pad|>": 300, "<|end|>": 301}


@pytest.mark.parametrize(
    ("added", "options"),
    [
        (ADDED, {"eos_token": "<|end|>"}),
        (
            None,
            {
                "eos_token": "<|end|>",
                "added_tokens_decoder": {id: {"content": token} for token, id in ADDED.items()},
            },
        ),
        (None, {"add_prefix_space": True}),
    ],
)
def test_what_lies_beside_vocabulary_and_merges_counts(
    added: dict[str, int] | None, options: dict[str, object], bpe: TextTokenizer, tmp_path: Path
) -> None:
    write_vocabulary_and_merges(bpe, tmp_path)
    if added is not None:
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    options = {"tokenizer_class": "GPT2Tokenizer", **options}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.eos_token_id == theirs.eos_token_id
    assert loaded.encode("The cat") == theirs.encode("The cat", add_special_tokens=False)


END, PAD = {"content": "<|end|>", "special": True}, {"content": "<|pad|>", "special": True}
BESIDE: dict[str, dict[str, dict[str, Any]]] = {
    "nothing": {},
    "added_tokens.json": {
        "added_tokens.json": {"<|pad|>": 300, "<|end|>": 301},
        "tokenizer_config.json": {"eos_token": "<|end|>"},
    },
    "a gap": {"added_tokens.json": {"<|end|>": 301}, "tokenizer_config.json": {"eos_token": "<|end|>"}},
    "added_tokens_decoder": {
        "tokenizer_config.json": {"eos_token": "<|end|>", "added_tokens_decoder": {"300": PAD, "301": END}}
    },
    "no special ones": {
        "tokenizer_config.json": {"added_tokens_decoder": {"300": {**PAD, "special": False}}}
    },
    "another kind": {
        "added_tokens.json": {"<|pad|>": 300},
        "tokenizer_config.json": {"added_tokens_decoder": {"300": {**PAD, "lstrip": True}}},
    },
    "special_tokens_map.json": {"special_tokens_map.json": {"eos_token": END}},
    "named alone": {
        "tokenizer_config.json": {
            "pad_token": "<|pad|>",
            "additional_special_tokens": ["<|user|>"],
            "eos_token": "<|end|>",
        }
    },
    "the same again": {
        "added_tokens.json": {"<|endoftext|>": 0},
        "special_tokens_map.json": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "tokenizer_config.json": {"added_tokens_decoder": {"0": {**END, "content": "<|endoftext|>"}}},
    },
}
CLASSES: dict[str, dict[str, dict[str, Any]]] = {
    "a class that adds a space": {
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    },
    "a class of other ids": {
        "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "unk_token": "<|endoftext|>"},
        "special_tokens_map.json": {"eos_token": "<|end|>"},
    },
}


def write_beside(tokenizer: TextTokenizer, folder: Path, files: dict[str, dict[str, Any]]) -> Any:
    """Returns what transformers makes of the tokenizer's folder with these files in it."""
    tokenizer.save(folder)
    for name, options in files.items():
        path = folder / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **options}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def ids_of(theirs: Any, text: str) -> list[int]:
    return list(theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_tokenizer_json_counts(name: str, bpe: TextTokenizer, tmp_path: Path) -> None:
    theirs = write_beside(bpe, tmp_path, BESIDE[name])
    for loaded in (load_tokenizer(str(tmp_path)), load_tokenizer_folder(tmp_path, "x", 7)):
        assert loaded.eos_token_id == theirs.eos_token_id
        assert loaded.vocab_size == len(theirs)
        for text in (TEXT, "a <|pad|><|end|> b"):
            assert loaded.encode(text) == ids_of(theirs, text)


@pytest.mark.parametrize("name", ["nothing", "the same again"])
def test_a_folder_that_agrees_is_opened_without_transformers(
    name: str, bpe: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_beside(bpe, tmp_path, BESIDE[name])
    monkeypatch.setattr("gpt_lightning.data.tokenizer.from_transformers", None)
    assert load_tokenizer(str(tmp_path)).fingerprint == bpe.fingerprint


@pytest.mark.parametrize("name", ["nothing", *CLASSES])
def test_text_is_prepared_with_what_transformers_makes_of_a_folder(
    name: str, bpe: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = write_beside(bpe, tmp_path / "folder", CLASSES.get(name, {}))
    (tmp_path / "a.txt").write_text(TEXT)
    options = {"train_files": str(tmp_path / "a.txt"), "val_fraction": 0.0, "seq_len": 4}
    options |= {"tokenizer": str(tmp_path / "folder"), "cache_dir": str(tmp_path / "cache")}
    for _ in range(2):
        data = TextDataModule(**options)
        tokens = data.prepare()["train"].tokens.tolist()
        assert tokens == [*ids_of(theirs, TEXT), theirs.eos_token_id]
        assert (data.text_tokenizer.fingerprint == bpe.fingerprint) is (name == "nothing")
        # It is not asked again, as importing it takes seconds.
        monkeypatch.setattr("gpt_lightning.data.tokenizer.from_transformers", None)


def test_a_folder_that_changes_is_compared_anew(bpe: TextTokenizer, tmp_path: Path) -> None:
    write_beside(bpe, tmp_path / "folder", {})
    (tmp_path / "a.txt").write_text(TEXT)
    for files in ({}, CLASSES["a class that adds a space"]):
        theirs = write_beside(bpe, tmp_path / "folder", files)
        data = TextDataModule(
            train_files=str(tmp_path / "a.txt"),
            tokenizer=str(tmp_path / "folder"),
            cache_dir=str(tmp_path / "cache"),
        )
        assert data.text_tokenizer.encode("The cat") == ids_of(theirs, "The cat")


def test_the_end_that_a_model_names_is_taken_where_the_folder_names_none(
    bpe: TextTokenizer, tmp_path: Path
) -> None:
    write_vocabulary_and_merges(bpe, tmp_path)
    assert load_tokenizer_folder(tmp_path, "x", 7).eos_token_id == 7
    assert load_tokenizer_folder(tmp_path, "x", 50256).eos_token_id == bpe.eos_token_id
    (tmp_path / "added_tokens.json").write_text(json.dumps(ADDED))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert load_tokenizer_folder(tmp_path, "x", 301).eos_token_id == 301
    assert load_tokenizer_folder(tmp_path, "x", 50256).eos_token_id == bpe.eos_token_id
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|pad|>"}')
    assert load_tokenizer_folder(tmp_path, "x", 301).eos_token_id == 300


def test_truncation_padding_and_code_in_a_folder_are_ignored(bpe: TextTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.enable_truncation(3)
    theirs.enable_padding(length=50)
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert load_tokenizer(str(tmp_path)).encode(TEXT) == bpe.encode(TEXT)
    assert not (tmp_path / "ran").exists()


def test_sizes_follow_from_the_text() -> None:
    sizes = {10: 512, 600_000: 512, 1_100_000: 1024, 2_000_000: 2048, 9_000_000: 8192, 10**12: 32768}
    assert {n_bytes: default_vocab_size(n_bytes) for n_bytes in sizes} == sizes


def test_specifications() -> None:
    assert [is_trained_here(spec) for spec in ("bpe", "bpe:300", "bytes", "bperfect")] == [1, 1, 0, 0]
    assert requested_vocab_size("bpe") is None and requested_vocab_size("bpe:257") == 257
    for spec in ("bpe:", "bpe:256", "bpe:-1", "bpe:1e4", "bpe:many"):
        with pytest.raises(ValueError, match=f"data.tokenizer={spec} asks for .*; try bpe:8192"):
            requested_vocab_size(spec)


def test_what_looks_like_a_path_never_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("gpt_lightning.data.tokenizer.from_transformers", refuse)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # whatever lies around where the tests are run
    (tmp_path / "file.json").write_text("{}")
    paths = ("./none", "~/none", "/none", "a/b/c", "../x", ".hidden", "a b", "", str(tmp_path / "file.json"))
    for name in paths:
        with pytest.raises(ValueError, match="data.tokenizer=.* is not a folder; give"):
            load_tokenizer(name)
    for name in ("gpt2", "org/name.v1-x"):
        with pytest.raises(AssertionError, match="asked the hub"):
            load_tokenizer(name)


def test_folders_without_a_usable_tokenizer_are_refused_in_one_line(tmp_path: Path) -> None:
    for name, content, message in (
        ("broken", "{", r"data.tokenizer=.*broken cannot be read \(.*\); save"),
        ("empty", None, r"data.tokenizer=.*empty cannot be loaded \(.*\); check"),
    ):
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=message) as raised:
            load_tokenizer(str(tmp_path / name))
        assert "\n" not in str(raised.value)
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    for eos_token, message in ((5, "eos_token=5 in its .* is not text"), ({"content": 2.5}, "=2.5 in")):
        (number := tmp_path / str(eos_token)).mkdir()
        train_bpe(["a"], 300).save(number)
        (number / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(str(number))
    with pytest.raises(ValueError, match="names no end-of-text token; add eos_token"):
        load_tokenizer(str(tmp_path / "words"))
    (tmp_path / "words" / "tokenizer_config.json").write_text('{"eos_token": ""}')
    with pytest.raises(ValueError, match="^eos_token='' cannot be a token; give the tokenizer another$"):
        load_tokenizer(str(tmp_path / "words"))
    with pytest.raises(ValueError, match="^the saved tokenizer has no token ''"):
        TextTokenizer.from_dict({**train_bpe(["a"], 300).state, "eos_token": ""})


def test_other_kinds_of_tokenizers_decode_too(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 7}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.vocab_size, loaded.eos_token_id) == (8, 7)
    assert loaded.decode(loaded.encode("b a")) == "b a"
