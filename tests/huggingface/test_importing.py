"""Folders of Hugging Face's become ordinary checkpoints, in every form of the weights, and run no code."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from gpt_lightning.__main__ import main
from gpt_lightning.checkpoint.checkpoint import Checkpoint, load_model
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.tokenizer import TextTokenizer, load_tokenizer
from gpt_lightning.generation.engine import generate
from gpt_lightning.generation.sampling import GenerationConfig as OurSettings
from gpt_lightning.huggingface.importing import import_model
from gpt_lightning.training.module import GPTLightningModule
from tests.huggingface.gpt2_folders import word_tokenizer, write_gpt2

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_gpt2(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(import_model(str(folder), "NAME")["state_dict"])


def split(tensors: dict[str, Any]) -> list[dict[str, Any]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[start::2]} for start in (0, 1)]


def write_index(folder: Path, whole: str, parts: dict[str, dict[str, Any]]) -> None:
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    (folder / f"{whole}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_sharded_safetensors(folder: Path, tensors: dict[str, Any]) -> None:
    parts = {f"model-0000{n}-of-00002.safetensors": part for n, part in enumerate(split(tensors), 1)}
    for file, part in parts.items():
        save_file(part, folder / file)
    write_index(folder, WEIGHTS, parts)


def as_bin(folder: Path, tensors: dict[str, Any]) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def as_bin_of_old(folder: Path, tensors: dict[str, Any]) -> None:
    """As OpenAI's models lie on the hub."""
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_sharded_bin(folder: Path, tensors: dict[str, Any]) -> None:
    parts = {f"pytorch_model-0000{n}-of-00002.bin": part for n, part in enumerate(split(tensors), 1)}
    for file, part in parts.items():
        torch.save(part, folder / file)
    write_index(folder, "pytorch_model.bin", parts)


@pytest.mark.parametrize("form", [as_sharded_safetensors, as_bin, as_bin_of_old, as_sharded_bin])
def test_every_form_of_the_weights_gives_the_same(
    form: Callable[[Path, dict[str, Any]], None], folder: Path
) -> None:
    expected = weights_of(folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    form(folder, tensors)
    found = weights_of(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_exactly(dtype: torch.dtype, folder: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(folder).to(dtype)
    model.save_pretrained(folder)
    main(["import-hf", str(folder), "x.ckpt"])
    ours, _ = load_model(Path("x.ckpt"))
    ids = torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(0))
    assert_close(ours(ids).logits, model.float()(ids).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.token_embedding.weight, model.transformer.wte.weight.float())


def test_the_checkpoint_is_an_ordinary_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["import-hf", str(folder), "x.ckpt"])
    assert capsys.readouterr().err == "checkpoint: x.ckpt\n"
    checkpoint = Checkpoint.open(Path("x.ckpt")).contents
    assert checkpoint["global_step"] == 0 and "optimizer_states" not in checkpoint
    model, tokenizer = load_model(Path("x.ckpt"))
    module = GPTLightningModule.load_from_checkpoint("x.ckpt")
    assert torch.equal(module.model.ln_f.bias, model.ln_f.bias)
    assert model.lm_head.weight is model.token_embedding.weight
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


def test_ids_that_the_tokenizer_never_gives_are_kept(tmp_path: Path) -> None:
    theirs = write_gpt2(tmp_path / "padded", word_tokenizer(60), vocab_size=101)
    main(["import-hf", str(tmp_path / "padded"), str(tmp_path / "x.ckpt")])
    model, tokenizer = load_model(tmp_path / "x.ckpt")
    assert tokenizer.vocab_size == 60 and model.config.vocab_size == 101
    assert torch.equal(model.token_embedding.weight, theirs.transformer.wte.weight)


def test_what_no_import_reads_does_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change_config(folder, num_labels=10**9, id2label={"x": 3}, bos_token_id=50256, eos_token_id=-7)
    main(["import-hf", str(folder), "x.ckpt"])
    assert capfd.readouterr().err == "checkpoint: x.ckpt\n"


def test_different_dropouts_are_told_in_one_plain_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(folder, resid_pdrop=0.2)
    main(["import-hf", str(folder), "x.ckpt"])
    assert capsys.readouterr().err.splitlines() == [
        "resid_pdrop=0.2, embd_pdrop=0.1, attn_pdrop=0.1 become one dropout=0.2",
        "checkpoint: x.ckpt",
    ]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_tokenizer_that_names_no_end_takes_the_models(file: str, folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    for name in ("config.json", "generation_config.json"):
        change_json(folder / name, eos_token_id=65 if name == file else None)
    main(["import-hf", str(folder), "x.ckpt"])
    _, tokenizer = load_model(Path("x.ckpt"))
    assert tokenizer.eos_token_id == 65


def test_another_end_than_the_tokenizers_is_told_and_ends_a_text_too(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(folder, eos_token_id=65)
    (folder / "generation_config.json").unlink()
    main(["import-hf", str(folder), "x.ckpt"])
    line, _ = capsys.readouterr().err.splitlines()
    assert "eos_token_id=65" in line and "256" in line
    _, tokenizer = load_model(Path("x.ckpt"))
    assert tokenizer.eos_token_id == 256 and tokenizer.eos_token_ids == [256, 65]


@pytest.mark.parametrize(
    ("ends", "of_generation", "expected"),
    [
        (256, [256, 65, 66], [256, 65, 66]),
        (256, 67, [256, 67]),
        ([256, 68], None, [256, 68]),
        (65, [70], [256, 65, 70]),
        (256, [256, -1, 10**9, True, "65", None, 1.0], [256]),
    ],
)
def test_all_that_ends_a_text_does_so_through_resume_and_export(
    ends: int | list[int], of_generation: Any, expected: list[int], folder: Path
) -> None:
    change_config(folder, eos_token_id=ends)
    change_json(folder / "generation_config.json", eos_token_id=of_generation)
    main(["import-hf", str(folder), "x.ckpt"])
    tokenizer = load_model(Path("x.ckpt"))[1]
    assert tokenizer.eos_token_ids == expected
    loaded = load_tokenizer(str(folder))
    assert loaded.eos_token_ids == [256] and loaded.fingerprint == tokenizer.fingerprint
    # A run goes on with a datamodule that knows the folder alone, and saves what it then knows.
    data = TextDataModule(tokenizer=str(folder))
    assert data.text_tokenizer.eos_token_ids == [256]
    data.load_state_dict(Checkpoint.open(Path("x.ckpt")).contents["TextDataModule"])
    assert data.state_dict()["tokenizer"] == tokenizer.state
    main(["export-hf", "x.ckpt", "back"])
    theirs = GenerationConfig.from_pretrained("back").eos_token_id
    assert theirs == (expected if len(expected) > 1 else 256)
    assert GPT2LMHeadModel.from_pretrained("back").config.eos_token_id == 256
    main(["import-hf", "back", "y.ckpt"])
    assert load_model(Path("y.ckpt"))[1].eos_token_ids == expected


def test_every_end_ends_a_generated_text_as_transformers_ends_it(folder: Path) -> None:
    settings = OurSettings(max_new_tokens=25, do_sample=False)
    main(["import-hf", str(folder), "free.ckpt"])
    model, tokenizer = load_model(Path("free.ckpt"))
    prompt = tokenizer.encode("The cat")
    free = generate(model, [prompt], settings, eos_token_id=None)[0].token_ids
    end = next(index for index in free[3:] if index not in free[:3])
    change_json(folder / "generation_config.json", eos_token_id=[256, end])
    main(["import-hf", str(folder), "x.ckpt"])
    command = ["predict", "--ckpt_path", "x.ckpt", "--data.prompts", '["The cat"]', "--output", "x.jsonl"]
    main([*command, "--generation.max_new_tokens", "25", "--generation.do_sample", "false"])
    row = json.loads(Path("x.jsonl").read_text())
    theirs = GPT2LMHeadModel.from_pretrained(folder).generate(
        torch.tensor([prompt]), max_new_tokens=25, do_sample=False
    )
    assert row["finish_reason"] == "eos"
    assert row["completion_tokens"] == free.index(end) == theirs.shape[1] - len(prompt) - 1


@pytest.mark.parametrize("name", ["bytes", "bpe", "bpe:300"])
def test_a_folder_may_be_called_like_a_tokenizer_of_ours(name: str, folder: Path) -> None:
    write_gpt2(Path(name), word_tokenizer(60))
    main(["import-hf", name, "x.ckpt"])
    _, tokenizer = load_model(Path("x.ckpt"))
    assert tokenizer.vocab_size == 60 and tokenizer.encode("w3 w4") == [3, 4]
    assert Checkpoint.open(Path("x.ckpt")).contents["TextDataModule"]["settings"]["tokenizer"] == f"./{name}"


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
        ("added_tokens.json", {"<|pad|>": 257, "<|end|>": 259}),
        ("special_tokens_map.json", {"eos_token": "<|end|>"}),
    ],
)
def test_a_tokenizer_is_read_as_transformers_reads_it(
    file: str, options: dict[str, Any], tmp_path: Path
) -> None:
    write_gpt2(tmp_path / "gpt2", vocab_size=300)
    path = tmp_path / "gpt2" / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **options}))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    contents = import_model(str(tmp_path / "gpt2"), "NAME")
    ours = TextTokenizer.from_dict(contents["TextDataModule"]["tokenizer"])
    assert ours.eos_token_id == theirs.eos_token_id
    text = "The cat <|pad|>"
    assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]


PLAIN = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
SIBLINGS: dict[str, dict[str, Any]] = {
    "by the layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "not by the width": {"scale_attn_weights": False},
    "by the layer alone": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
}


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_a_sibling_that_scales_its_scores_becomes_a_plain_gpt2(
    sibling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {**SIBLINGS[sibling], "n_layer": 3, "scale": 0.6, "attn_implementation": "eager"}
    write_gpt2(Path("theirs"), **options).half().save_pretrained("theirs")
    theirs = GPT2LMHeadModel.from_pretrained("theirs", dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(257, (2, 30), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    plain = GPT2Config.from_dict({**theirs.config.to_dict(), **PLAIN})
    untold = GPT2LMHeadModel(plain).eval()
    untold.load_state_dict(theirs.state_dict())
    assert not torch.allclose(untold(ids).logits, expected, atol=1e-2)
    main(["import-hf", "theirs", "x.ckpt"])
    assert_close(load_model(Path("x.ckpt"))[0](ids).logits, expected, atol=1e-5, rtol=1e-5)
    main(["export-hf", "x.ckpt", "back"])
    back = GPT2LMHeadModel.from_pretrained("back")
    assert {name: getattr(back.config, name) for name in PLAIN} == PLAIN
    assert_close(back(ids).logits, expected, atol=1e-5, rtol=1e-5)


def write_chinese(folder: Path, **options: Any) -> None:
    """A GPT-2 with BERT's tokenizer, in the files of uer/gpt2-chinese-cluecorpussmall, which name no end."""
    special = {kind: f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
    words = [*special.values(), *"这是很久之前的事情了。ab", "##a", "##b", "the", "cat", "##s"]
    write_gpt2(folder, vocab_size=len(words), bos_token_id=None, eos_token_id=None)
    for name in ("tokenizer.json", "generation_config.json"):
        (folder / name).unlink()
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.endswith("_token_id")}
    files = {
        "vocab.txt": "\n".join(words) + "\n",
        "config.json": json.dumps({**config, **options}),
        "tokenizer_config.json": json.dumps({"do_lower_case": False, "max_len": 1024}),
        "special_tokens_map.json": json.dumps({f"{kind}_token": word for kind, word in special.items()}),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def test_a_gpt2_with_berts_tokenizer_is_fine_tuned_and_exported(
    tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[SEP] ends its documents, and stands around no text."""
    monkeypatch.chdir(tmp_path)
    write_chinese(Path("theirs"), tokenizer_class="BertTokenizer")
    text = "这是很久之前的事情了。the cats ba"
    Path("text.txt").write_text(60 * f"{text}\n", encoding="utf-8")
    data = {"train_files": "text.txt", "tokenizer": None, "val_fraction": 0.2}
    config = str(tiny_config(data=data, model={"config": {}}))
    main(["import-hf", "theirs", "x.ckpt"])
    main(["fit", "--config", config, "--init_from", "x.ckpt", "--run_name=run", "--trainer.max_steps=2"])
    main(["export-hf", "checkpoints/run/last.ckpt", "back"])
    theirs, back = (AutoTokenizer.from_pretrained(name) for name in ("theirs", "back"))
    _, tokenizer = load_model(Path("checkpoints/run/last.ckpt"))
    assert tokenizer.eos_token_ids == [theirs.sep_token_id] == [back.eos_token_id]
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(text) == expected == back(text)["input_ids"]
    assert theirs.unk_token_id not in expected
    assert theirs.sep_token_id not in tokenizer.encode("the [SEP] cats")


# ---- what is refused


def test_a_vocabulary_that_transformers_takes_for_anothers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chinese(tmp_path / "theirs")
    line = fails(["import-hf", str(tmp_path / "theirs"), str(tmp_path / "x.ckpt")], capsys)
    assert "its tokenizer is read as a GPT2Tokenizer" in line
    assert 'of its vocab.txt; add "tokenizer_class": "BertTokenizer"' in line


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that must end with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(words)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == "", captured
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err
    return line


def change_config(folder: Path, **changes: Any) -> None:
    change_json(folder / "config.json", **changes)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def drop_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def lose_a_part(folder: Path) -> None:
    as_sharded_safetensors(folder, load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()


def point_outside(folder: Path) -> None:
    write_index(folder, WEIGHTS, {"../x.safetensors": {"wte.weight": 0}})
    (folder / WEIGHTS).unlink()


def hold_nan(tensors: dict[str, Any]) -> None:
    tensors["transformer.ln_f.bias"][0] = torch.nan


EMBEDDING = "transformer.wte.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "type": (lambda folder: change_config(folder, model_type="mamba"), "'mamba'; import one of gpt2, llama"),
    "no type": (lambda folder: (folder / "config.json").write_text("{}"), "of the type None"),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds no options"),
    "deep": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json is no JSON"),
    "no json": (lambda folder: (folder / "config.json").write_text("{"), "config.json is no JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "not a number": (lambda folder: change_config(folder, n_layer="two"), "config.json is no GPT-2's"),
    "activation": (lambda folder: change_config(folder, activation_function="relu"), "activation_function"),
    "heads": (lambda folder: change_config(folder, n_head=3), "model.config.d_model=16 is not divisible"),
    "layers": (lambda folder: change_config(folder, n_layer=10**9), "1000000000 layers, and the weights"),
    "shape": (lambda folder: change_config(folder, n_positions=64), "wpe.weight is [32, 16], and by"),
    "width": (lambda folder: change_config(folder, n_embd=2**63), "config.json gives sizes of no weights"),
    "positions": (lambda folder: change_config(folder, n_positions=2**62), "sizes of no weights"),
    "dropout": (lambda folder: change_config(folder, resid_pdrop=10**400), "config.json is no GPT-2's"),
    "head": (
        lambda folder: change_weights(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1})),
        "tie_word_embeddings=True, but lm_head.weight differs from wte.weight; set it to false in",
    ),
    "vocabulary": (lambda folder: change_config(folder, vocab_size=300), "wte.weight is [257, 16]"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "holds no weights"),
    "cut short": (cut_short, "model.safetensors cannot be read as weights"),
    "lost part": (lose_a_part, "lacks model-00002-of-00002.safetensors"),
    "outside": (point_outside, "lists no files beside it"),
    "lost weight": (
        lambda folder: change_weights(folder, lambda tensors: tensors.pop(EMBEDDING)),
        "the weights lack",
    ),
    "nan": (lambda folder: change_weights(folder, hold_nan), "ln_f.bias holds NaN or infinity"),
    "type of numbers": (
        lambda folder: change_weights(folder, lambda t: t.update({EMBEDDING: t[EMBEDDING].double()})),
        "weights of torch.float64",
    ),
    "no tokenizer": (drop_tokenizer, "holds no tokenizer"),
    "other tokenizer": (
        lambda folder: word_tokenizer(300).save(folder),
        "its tokenizer has 300 ids, and its model knows 257",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_folder_is_refused_in_one_line(
    what: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = REFUSED[what]
    spoil(folder)
    line = fails(["import-hf", str(folder), "x.ckpt"], capsys)
    assert line.startswith(f"error: NAME_OR_FOLDER={folder}") and message in line, line
    assert not Path("x.ckpt").exists()


def test_no_folder_and_a_file_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not there; give a folder" in fails(["import-hf", "./none", "x.ckpt"], capsys)
    assert "is a file; give a folder" in fails(["import-hf", str(folder / WEIGHTS), "x.ckpt"], capsys)
    Path("x.ckpt").touch()
    assert "OUT=x.ckpt exists already" in fails(["import-hf", str(folder), "x.ckpt"], capsys)
    assert Path("x.ckpt").stat().st_size == 0


class Payload:
    """Pickled, a call of Path.touch."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_a_bin_file_with_code_is_refused_and_never_runs(
    form: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = folder / "canary"
    weights = {**load_file(folder / WEIGHTS), "transformer.wte.weight": Payload(canary)}
    (folder / WEIGHTS).unlink()
    file = folder / "pytorch_model.bin"
    if form == "pickle":
        file.write_bytes(pickle.dumps(Payload(canary)))
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=form == "zip")
        torch.load(file)
        canary.unlink()  # it would have run
    line = fails(["import-hf", str(folder), "x.ckpt"], capsys)
    assert "pytorch_model.bin cannot be read as weights" in line
    assert not canary.exists() and not Path("x.ckpt").exists()


def test_code_beside_the_weights_does_not_run(folder: Path) -> None:
    (folder / "own.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    change_config(folder, auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    import_model(str(folder), "NAME")
    assert not (folder / "ran").exists()
