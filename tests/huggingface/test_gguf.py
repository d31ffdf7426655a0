"""What `export-gguf` writes is what llama.cpp runs: the same weights by its names, token ids and logits."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from gpt_lightning.__main__ import main
from gpt_lightning.checkpoint.checkpoint import Checkpoint, load_model
from gpt_lightning.checkpoint.contents import CONFIG_KEY
from gpt_lightning.data.tokenizer import TextTokenizer, load_tokenizer, train_bpe
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from tests.huggingface.gpt2_folders import word_tokenizer, write_gpt2
from tests.huggingface.llama_folders import LLAMA, QWEN2, QWEN3, write_llama

gguf = pytest.importorskip("gguf", reason="gguf is not installed (gpt_lightning[ecosystem])")

TEXTS = [
    "The cat sees a red house. Over the river, it naps 1234 times.",
    "A döner, naïve; 从前有一个国王。\n\n  two\tspaces  <|endoftext|> it's 👩‍👧 \r\n",
]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_head": 3, "n_embd": 15, "vocab_size": 331},  # ids that no text has
    "gpt2, own head": {"tie_word_embeddings": False},
    "llama": {**LLAMA, "n_kv_heads": 1, "rope_theta": 5e5},
    "llama, biases": {**LLAMA, "bias": True, "tie_embeddings": False, "d_head": 10, "n_kv_heads": 3},
    "llama, linear": {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama, llama3": {**LLAMA, "d_head": 32, "rope_scaling": LLAMA3},
    "llama, yarn": {**LLAMA, "d_head": 32, "rope_scaling": {**YARN, "attention_factor": 1.3}},
    "qwen2": {**QWEN2, "n_kv_heads": 1, "tie_embeddings": False},
    "qwen3": {**QWEN3, "d_head": 10},
    "qwen3, yarn": {**QWEN3, "d_head": 32, "rope_scaling": YARN},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tokenizer_of(kind: str) -> TextTokenizer:
    return load_tokenizer("bytes") if kind == "gpt2, own head" else train_bpe(TEXTS * 5, 300)


def exported(kind: str, dtype: str = "float32", tokenizer: TextTokenizer | None = None) -> Path:
    """The file; the checkpoint of it is x.ckpt."""
    tokenizer = tokenizer or tokenizer_of(kind)
    if kind.startswith("gpt2"):
        write_gpt2(Path("theirs"), tokenizer, **MODELS[kind])
    else:
        write_llama(Path("theirs"), tokenizer, **MODELS[kind])
    main(["import-hf", "theirs", "x.ckpt"])
    main(["export-gguf", "--ckpt_path", "x.ckpt", "--output", "new/x.gguf", "--dtype", dtype])
    assert [path.name for path in Path("new").iterdir()] == ["x.gguf"]
    return Path("new/x.gguf")


# ---- the file, read back


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }


def fields_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def expected_tensors(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Our weights by llama.cpp's names, a row of q, k and v after the other."""
    layers = {
        "ln_1": "attn_norm",
        "attn.out_proj": "attn_output",
        "attn.q_norm": "attn_q_norm",
        "attn.k_norm": "attn_k_norm",
        "ln_2": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    tables = {"token_embedding": "token_embd", "position_embedding": "position_embd", "ln_f": "output_norm"}
    expected = {}
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        if layer.startswith("blocks."):
            _, index, layer = layer.split(".", 2)
            if layer == "attn.qkv_proj":
                parts = rows_of(weight, config)
                if config.positions == "learned":
                    parts = {"qkv": torch.cat([parts["q"], parts["k"], parts["v"]])}
                expected |= {f"blk.{index}.attn_{part}.{kind}": rows for part, rows in parts.items()}
            else:
                expected[f"blk.{index}.{layers[layer]}.{kind}"] = weight
        elif layer in tables:
            expected[f"{tables[layer]}.{kind}"] = weight
        elif not config.tie_embeddings:
            expected["output.weight"] = weight
    return expected


def rows_of(qkv: Tensor, config: GPTConfig) -> dict[str, Tensor]:
    width, group = config.head_dim, config.n_heads // config.kv_heads
    is_llama = config.positions == "rope" and not config.qk_norm and config.bias != "qkv"
    rows: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    for number in range(qkv.shape[0] // width):
        head = qkv[number * width : (number + 1) * width]
        kind = "q" * group + "kv"
        part = kind[number % (group + 2)]
        if is_llama and part in "qk":  # a pair is row n and n + width / 2 of ours, two neighbours there
            head = torch.stack([head[n // 2 + n % 2 * (width // 2)] for n in range(width)])
        rows[part].append(head)
    return {part: torch.cat(heads) for part, heads in rows.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_every_tensor_is_there_by_its_name(kind: str, here: Path) -> None:
    tensors = tensors_of(exported(kind))
    checkpoint = Checkpoint.open(here / "x.ckpt")
    expected = expected_tensors(checkpoint.weights, checkpoint.config)
    assert tensors.keys() - {"rope_freqs.weight"} == expected.keys()
    assert ("rope_freqs.weight" in tensors) == (kind == "llama, llama3")
    for name, weight in expected.items():
        assert torch.equal(tensors[name], weight), name


@pytest.mark.parametrize("kind", ["gpt2", "gpt2, own head", "qwen3"])
def test_it_says_the_sizes_and_the_tokens(kind: str, here: Path) -> None:
    fields = fields_of(exported(kind))
    checkpoint = Checkpoint.open(here / "x.ckpt")
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    sizes = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "block_count": config.n_layers,
        "embedding_length": config.d_model,
        "feed_forward_length": config.mlp_width,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.kv_heads,
    }
    architecture = kind.split(",")[0]
    assert fields["general.architecture"] == architecture
    assert {name: fields[f"{architecture}.{name}"] for name in sizes} == sizes
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    n = tokenizer.vocab_size
    assert len({*tokens}) == len(types) == config.vocab_size
    assert tokens[:n] == [tokenizer._tokenizer.id_to_token(index) for index in range(n)]
    assert [index for index in range(n) if types[index] != 1] == [tokenizer.eos_token_id]
    assert types[n:] == [5] * (config.vocab_size - n) and types[tokenizer.eos_token_id] == 3
    for name in ("bos", "eos"):
        assert fields[f"tokenizer.ggml.{name}_token_id"] == tokenizer.eos_token_id
        assert fields[f"tokenizer.ggml.add_{name}_token"] is False


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
def test_matrices_are_rounded_and_nothing_else(dtype: str, here: Path) -> None:
    path = exported("llama, llama3", dtype)  # whose heads give rows of 96, and its width of 36 others
    exact = expected_tensors((checkpoint := Checkpoint.open(here / "x.ckpt")).weights, checkpoint.config)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    rounded = tensors_of(path)
    for name, weight in exact.items():
        if weight.ndim == 1:
            assert torch.equal(rounded[name], weight)
        elif dtype == "q8_0" and weight.shape[1] % 32 == 0:
            assert kinds[name] == "Q8_0"
            blocks = weight.unflatten(1, (-1, 32))
            step = blocks.abs().amax(-1, keepdim=True) / 127
            off = (rounded[name].unflatten(1, (-1, 32)) - blocks).abs() / step
            assert 0.1 < off.max() < 0.6  # half a step, and the step's own rounding
        else:
            assert kinds[name] == "F16" and torch.equal(rounded[name], weight.half().float())
    assert {"Q8_0", "F16", "F32"} - {*kinds.values()} == (set() if dtype == "q8_0" else {"Q8_0"})


def test_the_table_of_positions_stays_in_float32(here: Path) -> None:
    path = exported("gpt2", "float16")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (kinds["position_embd.weight"], kinds["token_embd.weight"]) == ("F32", "F16")


# ---- llama.cpp itself


@pytest.fixture
def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def opened(llama_cpp: Any, path: Path, n_positions: int) -> Any:
    return llama_cpp.Llama(
        str(path),
        n_ctx=n_positions,
        n_threads=1,
        n_gpu_layers=0,
        logits_all=True,
        type_k=0,  # keys and values in float32
        type_v=0,
        flash_attn=False,
        verbose=False,
    )


def error_of(llama_cpp: Any, path: Path) -> float:
    """That of the logits of a text as long as the model can see, as a share of ours."""
    model, _ = load_model("x.ckpt")
    size = model.config.vocab_size, model.config.max_position_embeddings
    ids = torch.randint(size[0], (1, size[1]), generator=torch.Generator().manual_seed(0))
    theirs = opened(llama_cpp, path, size[1])
    theirs.eval(ids[0].tolist())
    logits = torch.from_numpy(np.array(theirs.scores[: size[1]]))
    with torch.no_grad():
        ours = model(ids).logits[0]
    return ((logits - ours).norm() / ours.norm()).item()


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_gives_the_same_logits(kind: str, here: Path, llama_cpp: Any) -> None:
    # Its GELU is a table by half precision, in any file.
    assert error_of(llama_cpp, exported(kind)) < (1e-3 if kind.startswith("gpt2") else 1e-5)


@pytest.mark.parametrize("dtype, error", [("float16", 3e-3), ("q8_0", 3e-2)])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3, yarn"])
def test_llama_cpp_opens_smaller_files(
    kind: str, dtype: str, error: float, here: Path, llama_cpp: Any
) -> None:
    assert error_of(llama_cpp, exported(kind, dtype)) < error


def cutting(pre_tokenizer: Any, ignore_merges: bool = False) -> TextTokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    options = {"vocab_size": 320, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(**options, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    return TextTokenizer(tokenizer, "<|endoftext|>")


def by_pattern(pattern: str, ignore_merges: bool = False) -> TextTokenizer:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return cutting(pre_tokenizers.Sequence([split, bytes_only]), ignore_merges)


def by_digits() -> TextTokenizer:
    bytes_too = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return cutting(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_too]))


QWEN = (  # as its tokenizer.json has it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA_3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TOKENIZERS: dict[str, tuple[str, Callable[[], TextTokenizer]]] = {
    "bytes": ("gpt-2", lambda: load_tokenizer("bytes")),
    "own": ("gpt-2", lambda: train_bpe(TEXTS * 5, 300)),
    "Qwen": ("qwen2", lambda: by_pattern(QWEN)),
    "Llama 3": ("llama-bpe", lambda: by_pattern(LLAMA_3, ignore_merges=True)),
    "SmolLM": ("smollm", by_digits),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_gives_texts_the_same_ids(kind: str, here: Path, llama_cpp: Any) -> None:
    name, make = TOKENIZERS[kind]
    path = exported("gpt2", tokenizer=make())
    assert fields_of(path)["tokenizer.ggml.pre"] == name
    theirs = opened(llama_cpp, path, 32)
    _, tokenizer = load_model("x.ckpt")
    assert theirs.token_eos() == tokenizer.eos_token_id
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == ids
        assert theirs.detokenize(ids) == text.encode()


# ---- what is refused


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(["export-gguf", *words])
    assert exit.value.code == 2 and not Path("new").exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def checkpoint_of(**options: Any) -> None:
    """Writes x.ckpt, for whose shape `options` are."""
    write_gpt2(Path("theirs"))
    main(["import-hf", "theirs", "x.ckpt"])
    contents = Checkpoint.open(Path("x.ckpt")).contents
    config = GPTConfig(**{**contents[CONFIG_KEY], **options})
    del contents["hyper_parameters"]
    weights = {f"model.{name}": weight for name, weight in GPTModel(config).state_dict().items()}
    torch.save({**contents, "state_dict": weights, CONFIG_KEY: asdict(config)}, "x.ckpt")


TO_NEW = ["--ckpt_path", "x.ckpt", "--output", "new/x.gguf"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"activation": "gelu"}, "model.config.activation=gelu is not the GELU of llama.cpp's GPT-2"),
        ({"qk_norm": True}, "model.config.qk_norm=True with positions=learned is of no model"),
        ({**QWEN3, "rope_scaling": LLAMA3}, "rope_type=llama3 is for Llama alone in GGUF, not Qwen3"),
        ({**LLAMA, "rope_scaling": {**YARN, "beta_slow": 2.0}}, "beta_slow=2.0 is always 1 in llama.cpp"),
    ],
)
def test_a_shape_that_llama_cpp_lacks_is_refused(
    options: dict[str, Any], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint_of(**options)
    assert message in refused(TO_NEW, capsys)


def merged_end() -> TextTokenizer:
    """One whose end of text is also what its merges make of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextTokenizer(tokenizer, "ab")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: word_tokenizer(101), "is a WordLevel of other pieces than bytes"),
        (lambda: by_pattern(r"\p{L}+|\P{L}+"), "cuts words in a way of its own"),
        (lambda: by_pattern(QWEN, ignore_merges=True), "cuts words in a way of its own"),
        (merged_end, "makes its special token 'ab' of text, too"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(
    make: Callable[[], TextTokenizer], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gpt2(here / "theirs", make())
    main(["import-hf", "theirs", "x.ckpt"])
    assert f"error: its tokenizer {message}" in refused(TO_NEW, capsys)


def test_a_file_is_not_written_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_of()
    (here / "x.gguf").touch()
    line = refused(["--ckpt_path", "x.ckpt", "--output", "x.gguf"], capsys)
    assert line == "error: output=x.gguf exists already; name another file, or remove it"


def test_a_file_in_the_folders_place_is_a_mistake(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_of()
    for output in ("x.ckpt/x.gguf", "x.ckpt/deep/x.gguf"):
        line = refused(["--ckpt_path", "x.ckpt", "--output", output], capsys)
        assert line.startswith(f"error: output={output} cannot be written (")
        assert line.endswith(": x.ckpt); name another place") or ": x.ckpt/deep); name" in line


@pytest.mark.parametrize("dtype, weight, limit", [("float16", -7e4, 65504), ("q8_0", 9e6, 8319008)])
def test_weights_that_a_dtype_has_no_number_for_are_refused(
    dtype: str, weight: float, limit: int, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint_of(d_model=64)
    contents = torch.load("x.ckpt", weights_only=True)
    contents["state_dict"]["model.blocks.1.mlp.up_proj.weight"][2, 3] = weight
    torch.save(contents, "x.ckpt")
    line = refused([*TO_NEW, "--dtype", dtype], capsys)
    assert f"dtype={dtype} cannot hold blk.1.ffn_up.weight, which has weights above {limit};" in line


@pytest.mark.parametrize("dtype", ["float32", "float16", "q8_0"])
def test_diverged_weights_are_refused(dtype: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_of()
    contents = torch.load("x.ckpt", weights_only=True)
    contents["state_dict"]["model.blocks.1.ln_2.weight"][2] = torch.nan
    torch.save(contents, "x.ckpt")
    line = refused([*TO_NEW, "--dtype", dtype], capsys)
    assert "ckpt_path=x.ckpt holds NaN or infinity in blocks.1.ln_2.weight: its weights diverged; use" in line


def test_without_its_package_the_line_for_pip_is_given(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    line = refused(TO_NEW, capsys)
    assert line == "error: export-gguf needs gguf; pip install 'gpt_lightning[ecosystem]'"


def test_an_export_that_is_ended_leaves_nothing_behind(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(*args: object) -> None:
        assert list(here.glob(".x.gguf.*.tmp"))
        os.kill(os.getpid(), signal.SIGTERM)

    checkpoint_of()
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", end)
    former = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("nobody handles SIGTERM"))
    try:
        with pytest.raises(SystemExit) as exit:
            main(["export-gguf", "--ckpt_path", "x.ckpt", "--output", "x.gguf"])
    finally:
        signal.signal(signal.SIGTERM, former)
    assert exit.value.code == 143 and capsys.readouterr().err.endswith("SIGTERM: export-gguf ended\n")
    assert sorted(path.name for path in here.iterdir()) == ["theirs", "x.ckpt"]


@pytest.mark.parametrize("limit", [1000, 99000])
def test_a_full_disk_leaves_nothing_behind(
    limit: int, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint_of(d_ff=3000)
    capsys.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # amid the tokens, or the weights
    try:
        with pytest.raises(SystemExit) as exit:
            main(["export-gguf", "--ckpt_path", "x.ckpt", "--output", "x.gguf"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert exit.value.code == 5 and "x.gguf cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["theirs", "x.ckpt"]
