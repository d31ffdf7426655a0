"""What a checkpoint may hold, told in one line that names the file and what differs."""

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning.checkpoint.contents import check_contents, check_same_architecture
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.module import GPTLightningModule

CONFIG = GPTConfig(vocab_size=11, max_position_embeddings=8, n_layers=2, n_heads=2, d_model=8)


@pytest.fixture
def checkpoint() -> dict[str, Any]:
    module = GPTLightningModule(CONFIG)
    contents: dict[str, Any] = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(contents)
    return contents


@pytest.fixture
def trained() -> dict[str, Any]:
    """A checkpoint of a run at step 5, as version 0.1 wrote it."""
    path = Path(__file__).parents[1] / "old_files" / "file.ckpt"
    contents: dict[str, Any] = torch.load(path, weights_only=True)
    return contents


def complaint(checkpoint: Any) -> str:
    with pytest.raises(ValueError) as error:
        check_contents(Path("runs/x.ckpt"), checkpoint)
    message = str(error.value)
    assert "ckpt_path=runs/x.ckpt" in message and "\n" not in message
    return message


def test_our_own_pass(checkpoint: dict[str, Any]) -> None:
    check_contents(Path("x.ckpt"), checkpoint)
    weights_elsewhere = {**checkpoint, "state_dict": {}, "sharded_folder": "x.ckpt"}
    check_contents(Path("x.ckpt"), weights_elsewhere)
    untied = GPTLightningModule(GPTConfig(8, 4, 1, 1, 4, bias=False, tie_embeddings=False, dropout=0))
    contents: dict[str, Any] = {"state_dict": untied.state_dict()}
    untied.on_save_checkpoint(contents)
    check_contents(Path("x.ckpt"), contents)


@pytest.mark.parametrize("foreign", [[1, 2], "text", None])
def test_foreign_ones_are_refused(foreign: Any) -> None:
    assert "was not written by gpt_lightning" in complaint(foreign)


@pytest.mark.parametrize(
    "change, part",
    [
        ({"n_layers": "2"}, "gpt_config.n_layers='2'"),
        ({"n_layers": True}, "gpt_config.n_layers=True"),
        ({"dropout": torch.zeros(2, 2)}, "gpt_config.dropout=tensor("),
        ({"class_path": "evil.Model"}, "gpt_config.class_path, which is no option"),
        ({"rope_scaling": "yarn"}, "gpt_config.rope_scaling='yarn'"),
        ({"positions": "rope", "rope_scaling": {"rope_type": ["yarn"]}}, "holds no possible model: "),
        ({"positions": "rope", "rope_scaling": {3: {}}}, "holds no possible model: "),
        ({"bias": "q"}, "holds no possible model: "),
        ({"bias": 1}, "gpt_config.bias=1"),
        ({"d_model": 2**62}, "holds no possible model: "),
        ({"d_ff": 2**62}, "holds no possible model: "),
        ({"vocab_size": 2**70}, "holds no possible model: "),
        ({"d_model": -8}, "model.config.d_model=-8 is below 1"),
        ({"n_layers": 10**12}, "n_layers=1000000000000, but it holds the weights of 2 blocks"),
    ],
)
def test_a_config_of_other_things_is_refused(
    change: dict[str, Any], part: str, checkpoint: dict[str, Any]
) -> None:
    checkpoint["gpt_config"] = {**checkpoint["gpt_config"], **change}
    assert part in complaint(checkpoint)


@pytest.mark.parametrize(
    "key",
    ["hyper_parameters", "datamodule_hyper_parameters", "hparams", "module_arguments"],
)
@pytest.mark.parametrize(
    "value, part",
    [
        ({"act": {"class_path": "evil.X"}}, "['class_path']"),
        ({"a": [{"b": {"init_args": {}}}]}, "a[0].b['init_args']"),
        ({"_class_path": "evil.X"}, "['_class_path']"),
        ({"_instantiator": "os.system"}, "['_instantiator']"),
        ({"dict_kwargs": {}}, "['dict_kwargs']"),
        ({"optimizer": print}, "a builtin_function_or_method as"),
        ({"dtype": torch.float32}, "a dtype as"),
        ({1: 2}, "[1]"),
    ],
)
def test_hyper_parameters_that_could_act_are_refused(
    key: str, value: Any, part: str, checkpoint: dict[str, Any]
) -> None:
    message = complaint({**checkpoint, key: value})
    assert key in message and part in message


def test_a_type_for_hyper_parameters_is_refused(checkpoint: dict[str, Any]) -> None:
    assert "a type as hparams_type" in complaint({**checkpoint, "hparams_type": dict})


@pytest.mark.parametrize(
    "state",
    [
        3,
        {},
        {"settings": 3, "tokenizer": {}},
        {"settings": {}, "tokenizer": 3},
        {"settings": {}, "tokenizer": "a text"},
        {"settings": {}, "tokenizer": ["tokenizer_json", "eos_token"]},
        {"settings": {}, "tokenizer": {"tokenizer_json": 1, "eos_token": ""}},
        {"settings": {}, "tokenizer": {"tokenizer_json": "", "eos_token": "", "eos_token_ids": [-1]}},
    ],
)
def test_a_state_of_other_data_is_refused(state: Any, checkpoint: dict[str, Any]) -> None:
    assert "under TextDataModule" in complaint({**checkpoint, "TextDataModule": state})


@pytest.mark.parametrize("key", ["global_step", "loops", "lr_schedulers", "pytorch-lightning_version"])
def test_what_a_run_needs_to_go_on_is_named(key: str, trained: dict[str, Any]) -> None:
    check_contents(Path("x.ckpt"), trained)
    del trained[key]
    assert f"lacks '{key}'" in complaint(trained)
    del trained["optimizer_states"]
    check_contents(Path("x.ckpt"), trained)  # weights alone


def test_all_that_differs_in_the_weights_is_named(checkpoint: dict[str, Any]) -> None:
    weights = checkpoint["state_dict"]
    del weights["model.ln_f.weight"]
    weights["model.extra"] = torch.zeros(1)
    weights["model.position_embedding.weight"] = torch.zeros(3, 8)
    for name in ("attn.qkv_proj", "attn.out_proj", "mlp.up_proj", "mlp.down_proj"):
        weights[f"model.blocks.0.{name}.weight"] = torch.zeros(1)
    message = complaint(checkpoint)
    assert "1 missing (ln_f.weight); 1 unknown (extra); 5 of another shape (" in message
    assert "position_embedding.weight [3, 8] instead of [8, 8]" in message and ", ...)" in message
    weights["model.ln_f.bias"] = "no tensor"
    assert "6 of another shape" in complaint(checkpoint)


def test_what_is_not_the_models_may_be_there(checkpoint: dict[str, Any]) -> None:
    """A subclass may have weights of its own, and Lightning adds what it likes."""
    checkpoint["state_dict"]["teacher.weight"] = torch.zeros(2)
    check_contents(Path("x.ckpt"), {**checkpoint, "MyDataModule": {"a": object()}})


def test_a_large_model_is_checked_without_its_memory(tmp_path: Path) -> None:
    config = GPTConfig(n_layers=48, n_heads=25, d_model=1600)
    with torch.device("meta"):
        module = GPTLightningModule(config)
    # All weights show the same part of an empty file.
    longest = max(weight.numel() for weight in module.parameters())
    numbers = torch.from_file(str(tmp_path / "zeros"), shared=True, size=longest)
    shapes = {name: weight.shape for name, weight in module.state_dict().items()}
    weights = {name: numbers[: shape.numel()].view(shape) for name, shape in shapes.items()}
    contents: dict[str, Any] = {"state_dict": weights}
    module.on_save_checkpoint(contents)
    began, state = time.monotonic(), torch.get_rng_state()
    check_contents(Path("x.ckpt"), contents)
    assert time.monotonic() - began < 2
    assert torch.equal(torch.get_rng_state(), state)


def test_another_architecture_is_told_by_its_options(checkpoint: dict[str, Any]) -> None:
    check_same_architecture(CONFIG, checkpoint)
    check_same_architecture(GPTConfig(11, 8, 2, 2, 8, d_ff=32, dropout=0.5), checkpoint)
    with pytest.raises(ValueError) as error:
        check_same_architecture(GPTConfig(11, 8, 3, 2, 16, d_ff=32), checkpoint)
    assert "n_layers=3 (there 2), d_model=16 (there 8);" in str(error.value)


def test_checking_changes_nothing(checkpoint: dict[str, Any]) -> None:
    before = copy.deepcopy(checkpoint)
    check_contents(Path("x.ckpt"), checkpoint)
    assert before.keys() == checkpoint.keys() and before["gpt_config"] == checkpoint["gpt_config"]
