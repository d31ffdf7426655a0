"""Llama and its kin against transformers': logits, gradients, greedy tokens, round trips; what is refused."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.activations import ACT2FN

from gpt_lightning.checkpoint.checkpoint import Checkpoint, load_model
from gpt_lightning.cli.main import main
from gpt_lightning.data.tokenizer import train_bpe
from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.engine import generate
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.huggingface.families import family_of
from gpt_lightning.huggingface.importing import import_model
from gpt_lightning.model.config import GPTConfig
from tests.huggingface.gpt2_folders import word_tokenizer
from tests.huggingface.llama_folders import (
    LLAMA,
    QWEN2,
    QWEN3,
    V,
    make_model,
    qwen_tokenizer,
    reference_of,
    write_llama,
)

# What is trained with so few positions is read beyond them.
LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 24}
FURTHER = {"attention_factor": 1.3, "beta_fast": 2.0, "beta_slow": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "d_ff": 50},
    "llama: one key and value, linear": {
        **LLAMA,
        "n_kv_heads": 1,
        "tie_embeddings": False,
        "rope_scaling": LINEAR,
    },
    "llama: biases, long waves": {**LLAMA, "bias": True, "rope_theta": 5e5, "layer_norm_eps": 1e-6},
    "llama: llama3": {**LLAMA, "rope_scaling": LLAMA3},
    "qwen2: groups, yarn": {**QWEN2, "n_heads": 6, "n_kv_heads": 2, "rope_scaling": YARN},
    "qwen3": QWEN3,
    "qwen3: groups, wide heads": {**QWEN3, "n_heads": 6, "n_kv_heads": 2, "d_head": 10},
    "qwen3: not tied, yarn": {
        **QWEN3,
        "n_kv_heads": 1,
        "tie_embeddings": False,
        "rope_scaling": YARN | FURTHER,
    },
}
T = 40


def resolved(config: GPTConfig) -> dict[str, Any]:
    sizes = {"n_kv_heads": config.kv_heads, "d_head": config.head_dim, "d_ff": config.mlp_width}
    return {**asdict(config), **sizes}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients_equal_transformers(name: str) -> None:
    model = make_model(**VARIANTS[name])
    family, reference = reference_of(model)
    assert name.startswith(family.model_type)
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    expected = reference(ids).logits
    assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    targets = ids.roll(-1, 1)
    model(ids, targets).loss.backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    ours, theirs = family.weights_to(gradients(model), model.config), gradients(reference)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        assert_close(ours[key], gradient, atol=1e-5, rtol=1e-5, msg=lambda text: f"{key}: {text}")


@pytest.mark.parametrize("name", VARIANTS)
def test_200_greedy_tokens_are_identical(name: str) -> None:
    # A tied model of random weights repeats its last token.
    model = make_model(**VARIANTS[name] | {"tie_embeddings": False, "max_position_embeddings": 256})
    prompt = [5, 17, 3, 80]
    reference = reference_of(model)[1]
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["max_new_tokens"] = 200
    text = reference.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 4), **options)[0].tolist()
    settings = GenerationConfig(max_new_tokens=200, temperature=0.0)
    (completion,) = generate(model, [prompt], settings, eos_token_id=None)
    assert prompt + completion.token_ids == text
    assert len({*completion.token_ids}) > 3


@pytest.mark.parametrize("name", VARIANTS)
def test_a_round_trip_is_exact(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of transformers', our checkpoint, and a folder again."""
    monkeypatch.chdir(tmp_path)
    model = make_model(**VARIANTS[name])
    family, reference = reference_of(model)
    reference.save_pretrained("theirs", max_shard_size="20kB")
    assert len([*Path("theirs").glob("*.safetensors")]) > 1
    make_tokenizer = qwen_tokenizer if family.model_type == "qwen2" else word_tokenizer
    make_tokenizer(V - 8).save(Path("theirs"), max_length=48)
    main(["import-hf", "theirs", "ours.ckpt"])
    checkpoint = Checkpoint.open(Path("ours.ckpt"))
    loaded, _ = load_model(checkpoint.path)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert resolved(checkpoint.config) == resolved(model.config)
    main(["export-hf", "ours.ckpt", "again"])
    again = AutoModelForCausalLM.from_pretrained("again", local_files_only=True)
    assert type(again).__name__ == family.architecture
    for key, tensor in reference.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    stored = [json.loads(Path(name, "config.json").read_text()) for name in ("theirs", "again")]
    assert stored[0]["rope_parameters"] == stored[1]["rope_parameters"]
    texts = ["w3 w4", "it's 12"]
    ids_of_texts = [AutoTokenizer.from_pretrained(name)(texts)["input_ids"] for name in ("theirs", "again")]
    assert ids_of_texts[0] == ids_of_texts[1] and all(map(len, ids_of_texts[0]))
    ids = torch.arange(20)[None]
    assert_close(again.eval()(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_qwen2_with_another_tokenizer_is_written_as_a_llama(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers would read it as Qwen's own: other ids, without a word."""
    monkeypatch.chdir(tmp_path)
    tokenizer = train_bpe(["the cat's 1234 mats"], 270)
    write_llama(Path("theirs"), qwen_tokenizer(270), **QWEN2, n_kv_heads=1)
    contents = import_model("theirs", "X")
    contents["TextDataModule"]["tokenizer"] = tokenizer.state
    torch.save(contents, "ours.ckpt")
    main(["export-hf", "ours.ckpt", "back"])
    assert "it becomes a Llama with zeros for the biases that it lacks" in caplog.text
    theirs = AutoModelForCausalLM.from_pretrained("back", local_files_only=True)
    assert type(theirs) is transformers.LlamaForCausalLM
    ids = torch.arange(40)[None]
    assert_close(theirs(ids).logits, load_model(Path("ours.ckpt"))[0](ids).logits, atol=1e-5, rtol=1e-5)
    text = "the 12 caf\u0065\u0301s"
    assert AutoTokenizer.from_pretrained("back")(text)["input_ids"] == tokenizer.encode(text)
    main(["import-hf", "back", "again.ckpt"])
    model, read = load_model(Path("again.ckpt"))
    assert read.encode(text) == tokenizer.encode(text)
    assert_close(model(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_mistral_becomes_a_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model(**LLAMA, n_kv_heads=1, d_head=10, tie_embeddings=False)
    llama = reference_of(model)[1]
    options = {**llama.config.to_dict(), "model_type": "mistral", "sliding_window": 48}
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig.from_dict(options)).eval()
    theirs.load_state_dict(llama.state_dict())
    theirs.save_pretrained("theirs")
    word_tokenizer(V).save(Path("theirs"), max_length=48)
    main(["import-hf", "theirs", "ours.ckpt"])
    main(["export-hf", "ours.ckpt", "again"])
    again = AutoModelForCausalLM.from_pretrained("again", local_files_only=True)
    assert type(again) is transformers.LlamaForCausalLM
    ids = torch.arange(48)[None]
    expected = theirs(ids).logits
    for logits in (load_model(Path("ours.ckpt"))[0](ids).logits, again(ids).logits):
        assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"sliding_window": 47}, {}])
def test_a_mistral_that_sees_the_last_positions_alone_is_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Its window is 4096 where nothing is said."""
    reference_of(make_model(**LLAMA))[1].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    positions = 48 if options else 32_768
    config |= {"model_type": "mistral", "max_position_embeddings": positions, **options}
    (tmp_path / "config.json").write_text(json.dumps(config))
    window = options.get("sliding_window", 4096)
    with pytest.raises(UserError, match=f"sliding_window={window} is below max_"):
        import_model(str(tmp_path), "X")


def test_bfloat16_becomes_float32_exactly(tmp_path: Path) -> None:
    _, reference = reference_of(make_model(**QWEN3))
    reference.to(torch.bfloat16).save_pretrained(tmp_path)
    word_tokenizer(V - 8).save(tmp_path, max_length=48)
    found = import_model(str(tmp_path), "X")["state_dict"]["model.token_embedding.weight"]
    assert torch.equal(found, reference.state_dict()["model.embed_tokens.weight"].float())


def test_the_other_name_of_its_activation_and_its_dropout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference_of(make_model(**LLAMA))[1].save_pretrained(tmp_path)
    word_tokenizer(V - 8).save(tmp_path, max_length=48)
    before = import_model(str(tmp_path), "X")["gpt_config"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hidden_act"] == "silu" and not any("dropout" in line for line in caplog.messages)
    changed = {**config, "hidden_act": "swish", "attention_dropout": 0.1}
    assert ACT2FN["swish"](torch.tensor(0.3)) == F.silu(torch.tensor(0.3))
    (tmp_path / "config.json").write_text(json.dumps(changed))
    assert import_model(str(tmp_path), "X")["gpt_config"] == {**before, "dropout": 0.1}
    assert "attention_dropout=0.1 becomes dropout=0.1, of all activations" in caplog.messages


REFUSED = {
    "dynamic": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope_type='dynamic' scales the positions, as GPTModel cannot; import a model with one of linear",
    ),
    "of old": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    "DeepSeek's": (
        {"rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 0.7}},
        "mscale=0.7 with rope_type='yarn'",
    ),
    "no number": (
        {"rope_parameters": {**YARN, "rope_theta": 1e4, "factor": -1.0}},
        "rope_scaling.factor=-1.0",
    ),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "biases of attention": ({"attention_bias": True}, "attention_bias=True"),
    "a sliding window": ({"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window=True"),
    "windows by the layer": (
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16},
        "layer_types=['full_attention', 'sliding_attention'] changes its attention",
    ),
    "another kind": ({"model_type": "mamba"}, "'mamba'; import one of gpt2, llama, mistral, qwen2, qwen3"),
    "more layers": (
        {"num_hidden_layers": 3, "layer_types": 3 * ["full_attention"]},
        "says 3 layers, and the weights are of 2",
    ),
    "other heads": ({"num_key_value_heads": 1}, "self_attn.k_proj.weight is [36, 36], and by"),
}


def test_scaled_positions_are_read_as_they_were_once_written(tmp_path: Path) -> None:
    reference_of(make_model(**LLAMA, rope_theta=5e5, rope_scaling=YARN))[1].save_pretrained(tmp_path)
    word_tokenizer(V - 8).save(tmp_path, max_length=48)
    before = import_model(str(tmp_path), "X")["gpt_config"]
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert import_model(str(tmp_path), "X")["gpt_config"] == before
    assert before["rope_scaling"] == YARN


@pytest.mark.parametrize("name", REFUSED)
def test_what_computes_something_else_is_refused(name: str, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    reference_of(make_model(**QWEN3))[1].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if "rope_scaling" in changes:
        del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError) as error:
        import_model(str(tmp_path), "X")
    assert message in str(error.value) and str(error.value).startswith(f"X={tmp_path}: ")


def test_the_speeds_that_files_of_old_carry_are_no_weights(tmp_path: Path) -> None:
    """As those of Llama 2 do, in every layer."""
    _, reference = reference_of(make_model(**LLAMA))
    reference.save_pretrained(tmp_path)
    word_tokenizer(V - 8).save(tmp_path, max_length=48)
    before = import_model(str(tmp_path), "X")["state_dict"]
    speeds = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(6) for n in range(2)}
    save_file({**dict(reference.named_parameters()), **speeds}, tmp_path / "model.safetensors")
    after = import_model(str(tmp_path), "X")["state_dict"]
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("change, problem", [("gone", "lack"), ("more", "hold unknown")])
def test_missing_and_unknown_weights_are_named(change: str, problem: str, tmp_path: Path) -> None:
    _, reference = reference_of(make_model(**LLAMA, tie_embeddings=False))
    reference.save_pretrained(tmp_path)
    weights = dict(reference.state_dict())
    key = "model.layers.1.self_attn.q_norm.weight"
    if change == "gone":
        key = "model.layers.1.self_attn.q_proj.weight"
        del weights[key]
    else:
        weights[key] = torch.ones(12)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"the weights {problem} {key}"):
        import_model(str(tmp_path), "X")


@pytest.mark.parametrize(
    "options, odd",
    [
        ({**LLAMA, "norm": "layer"}, "model.config.norm=layer"),
        ({**LLAMA, "activation": "gelu"}, "model.config.activation=gelu"),
        ({**QWEN3, "bias": True}, "model.config.bias=True"),
        ({**QWEN3, "bias": "qkv"}, "model.config.bias=qkv"),
        ({**QWEN2, "d_head": 10}, "model.config.d_head=10"),
        ({**QWEN2, "d_model": 38, "d_head": 12}, "model.config.d_head=12"),
        ({**LLAMA, "d_model": 38, "d_head": 12}, "model.config.d_model=38"),
        ({"activation": "swiglu"}, "model.config.activation=swiglu"),
        ({"n_kv_heads": 1}, "model.config.n_kv_heads=1"),
        ({"qk_norm": True}, "model.config.qk_norm=True"),
        ({"d_head": 8}, "model.config.d_head=8"),
        ({"d_model": 38, "d_head": 12}, "model.config.d_head=12"),
    ],
)
def test_what_no_model_of_theirs_computes_is_refused_by_name(options: dict[str, Any], odd: str) -> None:
    with pytest.raises(UserError) as error:
        family_of(make_model(**options).config)
    assert f"{odd} with positions=" in str(error.value)


@pytest.mark.parametrize(
    "options, kind",
    [
        ({**QWEN3, "n_kv_heads": 1, "rope_scaling": LLAMA3}, "Qwen3ForCausalLM"),
        ({"qk_norm": True}, None),
    ],
)
def test_a_run_from_the_command_line(
    options: dict[str, Any],
    kind: str | None,
    tiny_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Trained, resumed, and exported where a model of theirs has its shape, which is said at the start."""
    model = {"config": {"n_layers": 1, "n_heads": 2, "d_model": 16, "max_position_embeddings": 16, **options}}
    config = str(tiny_config(model=model))
    for steps in ("2", "4"):
        named = ["--run_name", "run", "--ckpt_path", "last", f"--trainer.max_steps={steps}"]
        main(["fit", "--config", config, *named])
        said = "this shape exports to nothing (export-hf): model.config.qk_norm=True with positions=learned"
        assert (said in capsys.readouterr().err) is (kind is None)
    path = tmp_path / "checkpoints" / "run" / "last.ckpt"
    if kind is None:
        with pytest.raises(SystemExit, match="2"):
            main(["export-hf", str(path), str(tmp_path / "hf")])
        assert not (tmp_path / "hf").exists()
        return
    main(["export-hf", str(path), str(tmp_path / "hf")])
    ours = load_model(path)[0].eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert type(theirs).__name__ == kind
    ids = torch.arange(12)[None]
    assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "A language model of Qwen3's architecture" in card and "rope_theta 10000.0" in card
    # Of Muon and of WSD, which the run had not.
    assert "name adamw" in card and "momentum" not in card
    assert "shape cosine" in card and "decay_fraction" not in card
