"""What `export-hf` writes is what transformers opens: the same bits, logits, texts and token ids."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, pipeline

import gpt_lightning.checkpoint.atomic as atomic
from gpt_lightning.__main__ import main
from gpt_lightning.checkpoint.checkpoint import Checkpoint, load_model
from gpt_lightning.checkpoint.contents import CONFIG_KEY
from gpt_lightning.data.tokenizer import TextTokenizer, load_tokenizer, train_bpe
from gpt_lightning.generation.engine import generate
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.huggingface.families import GPT2
from gpt_lightning.huggingface.model_card import model_card
from tests.huggingface.gpt2_folders import word_tokenizer, write_gpt2

TEXT = "w1 w2 the cat sees a dog\nand the dög"
TOKENIZERS: dict[str, Callable[[], TextTokenizer]] = {
    "words": lambda: word_tokenizer(101),
    "bytes": lambda: load_tokenizer("bytes"),
    "bpe": lambda: train_bpe([TEXT * 20], 270),
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "words": ("words", {"n_positions": 256, "n_head": 3, "n_embd": 15}),
    "padded words": ("words", {"vocab_size": 131, "n_positions": 220, "tie_word_embeddings": False}),
    "bytes": ("bytes", {"n_positions": 220, "activation_function": "gelu", "tie_word_embeddings": False}),
    "bpe": ("bpe", {"n_positions": 220, "n_inner": None, "layer_norm_epsilon": 1e-6}),
}


@pytest.fixture(scope="module", params=OPTIONS)
def trip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `theirs`, the checkpoint of it, and `back`, the folder of that."""
    folder = tmp_path_factory.mktemp("trip")
    tokenizer, options = OPTIONS[request.param]
    write_gpt2(folder / "theirs", TOKENIZERS[tokenizer](), **options)
    main(["import-hf", str(folder / "theirs"), str(folder / "x.ckpt")])
    main(["export-hf", str(folder / "x.ckpt"), str(folder / "back")])
    return folder


def test_a_round_trip_is_exact(trip: Path) -> None:
    theirs, back = (load_file(trip / name / "model.safetensors") for name in ("theirs", "back"))
    assert back.keys() == theirs.keys()  # with a tied head stored once
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    with safe_open(trip / "back" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_configuration_says_all_that_it_said(trip: Path) -> None:
    theirs, back = (GPT2LMHeadModel.from_pretrained(trip / name).config for name in ("theirs", "back"))
    ends = ("bos_token_id", "eos_token_id")
    assert {**back.to_dict(), **dict.fromkeys(ends)} == {
        **theirs.to_dict(),
        **dict.fromkeys(ends),
        "_name_or_path": back._name_or_path,
    }
    _, tokenizer = load_model(trip / "x.ckpt")
    assert back.eos_token_id == back.bos_token_id == tokenizer.eos_token_id
    assert back.architectures == ["GPT2LMHeadModel"]


def test_logits_are_equal(trip: Path) -> None:
    model, tokenizer = load_model(trip / "x.ckpt")
    ids = torch.randint(model.config.vocab_size, (3, 70), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(trip / "back")
    with torch.no_grad():
        assert_close(theirs(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_200_greedy_tokens_are_identical(trip: Path) -> None:
    model, tokenizer = load_model(trip / "x.ckpt")
    prompt = tokenizer.encode(TEXT)[:12]
    settings = GenerationConfig(max_new_tokens=200, do_sample=False)
    (ours,) = generate(model, [prompt], settings, eos_token_id=None)
    theirs = AutoModelForCausalLM.from_pretrained(trip / "back")
    out = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=200, min_new_tokens=200, do_sample=False, eos_token_id=None
    )
    assert len(ours.token_ids) == 200
    assert ours.token_ids == out[0, len(prompt) :].tolist()
    assert len(set(ours.token_ids)) >= 3, "a model that repeats itself shows little"


def test_auto_tokenizer_gives_the_same_ids(trip: Path) -> None:
    model, ours = load_model(trip / "x.ckpt")
    theirs = AutoTokenizer.from_pretrained(trip / "back")
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
    assert theirs.eos_token_id == ours.eos_token_id
    assert len(theirs) == model.config.vocab_size  # a token for each id that the model can write
    assert theirs.decode(range(ours.vocab_size, len(theirs)), skip_special_tokens=True) == ""
    assert theirs.model_max_length == model.config.max_position_embeddings


def test_a_pipeline_opens_it_and_writes_the_same_text(trip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = load_model(trip / "x.ckpt")
    prompt = "w3 w4"
    settings = GenerationConfig(max_new_tokens=8, do_sample=False)
    (ours,) = generate(model, [tokenizer.encode(prompt)], settings, eos_token_id=tokenizer.eos_token_id)
    writer = pipeline("text-generation", model=str(trip / "back"))
    (row,) = writer(prompt, max_new_tokens=8, do_sample=False, return_tensors=True)
    new = row["generated_token_ids"][len(tokenizer.encode(prompt)) :]
    ids = ours.token_ids + [tokenizer.eos_token_id] * (ours.finish_reason == "eos")
    assert new in (ours.token_ids, ids)


KINDS: dict[str, Callable[[list[str]], Tokenizer]] = {
    "BERT": lambda texts: tokenizer_of(
        models.WordPiece({piece: n for n, piece in enumerate(["[UNK]", *texts[0].split(), "a", "##s"])}),
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(),
    ),
    "T5": lambda texts: tokenizer_of(
        models.Unigram([("[UNK]", 0.0), *((c, -3.0) for c in sorted({*texts[0], "▁"}))], unk_id=0),
        pre_tokenizers.Metaspace(),
    ),
    "Llama 2": lambda texts: tokenizer_of(
        models.BPE({c: n for n, c in enumerate(sorted({*texts[0], "▁", "[UNK]"}))}, [], unk_token="[UNK]"),
        None,
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "GPT-2": lambda texts: train_bpe(texts, 270)._tokenizer,
}


def tokenizer_of(model: Any, pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_gives_the_model_what_it_was_trained_with(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token stands before a text there, and none after it, though its tokenizer came with such."""
    monkeypatch.chdir(tmp_path)
    raw = KINDS[kind]([TEXT])
    raw.add_special_tokens(["[CLS]", "[SEP]"])
    around = [(token, raw.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    write_gpt2(Path("theirs"), TextTokenizer(raw, "[SEP]"), scale=1.0)
    raw.save("theirs/tokenizer.json")
    main(["import-hf", "theirs", "x.ckpt"])
    main(["export-hf", "x.ckpt", "back"])
    model, tokenizer = load_model(Path("x.ckpt"))
    prompt = tokenizer.encode("the cat sees")
    assert prompt and not {index for _, index in around} & {*prompt}
    settings = GenerationConfig(max_new_tokens=12, do_sample=False)
    (ours,) = generate(model, [prompt], settings, eos_token_id=tokenizer.eos_token_ids)
    writer = pipeline("text-generation", model="back")
    (row,) = writer("the cat sees", max_new_tokens=12, do_sample=False, return_tensors=True)
    ended = [tokenizer.eos_token_id] * (ours.finish_reason == "eos")
    assert row["generated_token_ids"] == prompt + ours.token_ids + ended
    assert load_tokenizer("back").encode(TEXT) == tokenizer.encode(TEXT)


# ---- what is written, and where


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_gpt2(tmp_path / "theirs")
    main(["import-hf", "theirs", "x.ckpt"])
    return tmp_path / "x.ckpt"


def test_it_writes_these_files_for_everybody_to_read(checkpoint: Path) -> None:
    main(["export-hf", "x.ckpt", "new/back"])
    files = {path.name: path.stat().st_mode & 0o777 for path in Path("new/back").iterdir()}
    assert files.keys() == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert len(set(files.values())) == 1
    assert json.loads(Path("new/back/generation_config.json").read_text())["eos_token_id"] == 256
    assert [path.name for path in Path("new").iterdir()] == ["back"]


def test_a_model_without_biases_gives_the_same_logits(checkpoint: Path) -> None:
    contents = Checkpoint.open(checkpoint).contents
    weights = {name: t for name, t in contents["state_dict"].items() if not name.endswith(".bias")}
    config = {**contents[CONFIG_KEY], "bias": False}
    del contents["hyper_parameters"]  # which say the same of the former one
    torch.save({**contents, "state_dict": weights, CONFIG_KEY: config}, "plain.ckpt")
    main(["export-hf", "plain.ckpt", "back"])
    model, _ = load_model(Path("plain.ckpt"))
    ids = torch.randint(model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained("back")
    assert_close(theirs(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_an_existing_folder_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in ("theirs", "x.ckpt"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(["export-hf", "x.ckpt", target])
        assert exit.value.code == 2
        assert capsys.readouterr().err == (
            f"error: FOLDER={target} exists already; name another, or remove it\n"
        )
    Path("empty").mkdir()
    main(["export-hf", "x.ckpt", "empty"])
    AutoModelForCausalLM.from_pretrained("empty")


@pytest.mark.parametrize("target", [".", "link"])
def test_an_empty_folder_may_have_any_name(
    target: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("empty").mkdir()
    Path("link").symlink_to("empty")
    if target == ".":
        monkeypatch.chdir("empty")
    main(["export-hf", str(checkpoint), target])
    AutoModelForCausalLM.from_pretrained(target)
    written = checkpoint.parent / "empty"
    assert {path.suffix for path in written.iterdir()} == {".md", ".json", ".safetensors"}
    assert (checkpoint.parent / "link").is_symlink()


def test_a_checkpoint_without_a_tokenizer_leaves_nothing_behind(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = Checkpoint.open(checkpoint).contents
    del contents["TextDataModule"]
    torch.save(contents, "bare.ckpt")
    with pytest.raises(SystemExit):
        main(["export-hf", "bare.ckpt", "new/deep/back"])
    assert "the checkpoint holds no tokenizer" in capsys.readouterr().err
    assert not Path("new").exists()


def test_what_is_no_checkpoint_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("torn.ckpt").write_bytes(checkpoint.read_bytes()[:-9])
    torch.save({"state_dict": {}}, "other.ckpt")
    for name, message in (
        ("none.ckpt", "is not a file"),
        ("torn.ckpt", "cannot be read as a checkpoint"),
        ("theirs", "is a folder without a whole checkpoint"),
        ("other.ckpt", "was not written by gpt_lightning"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(["export-hf", name, "back"])
        (line,) = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and message in line
        assert not Path("back").exists()


def test_a_full_disk_leaves_nothing_behind(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    before = sorted(path.name for path in Path().iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(["export-hf", "x.ckpt", "back"])
    assert exit.value.code == 5 and "back cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == before


def test_a_disk_that_fills_amid_the_weights_leaves_nothing_behind(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in Path().iterdir())
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        with pytest.raises(SystemExit) as exit:
            main(["export-hf", "x.ckpt", "back"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert exit.value.code == 5 and "back cannot be written (File too large" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == before


def test_diverged_weights_are_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = torch.load(checkpoint, weights_only=True)
    contents["state_dict"]["model.token_embedding.weight"][2, 3] = -torch.inf
    torch.save(contents, checkpoint)
    with pytest.raises(SystemExit) as exit:
        main(["export-hf", "x.ckpt", "new/back"])
    assert exit.value.code == 2 and not Path("new").exists()
    assert "holds NaN or infinity in token_embedding.weight" in capsys.readouterr().err


# ---- the model card


def test_the_card_of_an_imported_model_invents_nothing(checkpoint: Path) -> None:
    card = model_card(Checkpoint.open(checkpoint), "back", GPT2)
    assert "begun from: the weights of `theirs`" in card
    assert "training text: not known" in card and "training: none since" in card
    assert "positions learned" in card and "rope_theta" not in card
    assert "Not known: the checkpoint was saved before any validation." in card


def test_the_card_of_a_stranger_stays_a_card(checkpoint: Path) -> None:
    contents = Checkpoint.open(checkpoint).contents
    data = {**contents["TextDataModule"], "text": {"train_files": [["a`b\n# c", "0"], 3], "val_files": "x"}}
    evil = {"TextDataModule": data, "begun_from": "x`\n\n# y", "last_validation": {"loss": "1", "step": None}}
    contents = {**contents, **evil, "hyper_parameters": 7, "global_step": 3}
    card = model_card(Checkpoint(checkpoint, contents), "back\n# z", GPT2)
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert headings == ["# back # z", "## Data", "## Recipe", "## Final perplexity", "## Use"]
    assert "training text: `ab # c`" in card
