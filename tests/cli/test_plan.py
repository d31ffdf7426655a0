"""What a fit would take is told of its words alone, without text and network, and a mistake in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.__main__ import main
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from tests.cli.test_generate import write_checkpoint

H100 = ["--device", "h100"]
ROUNDED = ["--trainer.strategy.gather_dtype", "bf16"]


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main(["plan", *words, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "h1000"], "device=h1000 is unknown; choose one of b200, h200, h100,"),
        ([*H100, "--config", "gpt2_xl_tp2", "--trainer.devices", "3"], "trainer.devices=3 a node is not"),
        (
            [*H100, "--config", "gpt2_xl_tp2", "--model.config.n_heads", "25"],
            "model.config.n_heads=25 is not divisible by trainer.strategy.tensor_parallel_size=2",
        ),
        ([*H100, "--data.tokenizer", "bpe"], "give --model.config.vocab_size"),
        ([*H100, "--data.tokenizer", "nobody/nothing"], "give --model.config.vocab_size"),
        (
            [*H100, "--data.tokenizer", "bytes", "--model.config.vocab_size", "512"],
            "model.config.vocab_size=512 contradicts data.tokenizer=bytes, which has 257 ids",
        ),
        ([*H100, "--shard_replicas", "some"], "shard_replicas='some' is unknown; choose one of none, "),
        (
            [*H100, "--config", "gpt2_xl_8gpu", *ROUNDED, "--shard_replicas", "none"],
            "trainer.strategy.gather_dtype=bf16 is for weights that replicas share, and shard_replicas=none",
        ),
        ([*H100, "--nodes", "0"], "trainer.num_nodes=0 is below 1"),
        ([*H100, "--price", "-1"], "price=-1.0 is not above 0"),
        ([*H100, "--trainer.strategy", "fsdp"], "trainer.strategy=fsdp is none that plan knows"),
        ([*H100, "--trainer.precision", "transformer-engine"], "trainer.precision=transformer-engine"),
        (["--device", "t4", "--config", "gpt2_small"], "no rate of T4 is known for bf16; choose 16-mixed"),
        ([*H100, "--trainer.precision", "64-true"], "no rate of H100 is known for fp64; choose another"),
        ([*H100, "--init_from", "nobody/nothing"], "init_from=nobody/nothing is not on this machine"),
        ([*H100, "--node", "2"], "did you mean --nodes"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["plan", *words])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and message in said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    assert not [*tmp_path.iterdir()]


def test_a_recipe_is_planned_without_its_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--config", "gpt2_small", "--trainer.devices", "8", "--device", "a100", "--price", "2"]
    plan = planned([*words, "--trainer.accumulate_grad_batches", "5"], capsys)
    assert plan["parameters"] == 124_439_808 and plan["fits"]
    assert plan["tokens_a_step"] == 491_520 and plan["tokens"] == 600_000 * 491_520
    assert plan["cost"] == pytest.approx(2 * 8 * plan["hours"])
    assert plan["hours"] == pytest.approx(600_000 * plan["seconds_a_step"] / 3600)
    assert plan["checkpoint_bytes"] == 12 * 124_439_808
    sent = {"peers": 0, "gradients": 2 * 7 / 8 * 4 * 124_439_808, "weights": 0, "nodes": 0}
    assert plan["bytes_sent_a_step"] == sent
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (["--data.tokenizer", "bytes"], 257),
        (["--data.tokenizer", "bpe:4000"], 4000),
        (["--data.tokenizer", "bpe", "--model.config.vocab_size", "999"], 999),
    ],
)
def test_the_vocabulary_comes_from_the_options(
    words: list[str], size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned([*H100, *words], capsys)
    assert plan["setup"]["config"]["vocab_size"] == size
    options = {name: value for name, value in plan["setup"]["config"].items()}
    assert plan["parameters"] == sum(p.numel() for p in GPTModel(GPTConfig(**options)).parameters())


def test_the_vocabulary_comes_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("own.yaml").write_text("data: {tokenizer: bpe}\nmodel: {config: {vocab_size: 32000}}")
    assert planned([*H100, "--config", "own.yaml"], capsys)["setup"]["config"]["vocab_size"] == 32000


def test_a_checkpoint_has_architecture_and_vocabulary(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoints" / "run" / "last.ckpt"
    write_checkpoint(path)
    config = planned([*H100, "--init_from", str(path)], capsys)["setup"]["config"]
    assert (config["n_layers"], config["d_model"]) == (2, 16)


def test_the_shipped_recipe_that_begins_with_gpt2_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned([*H100, "--config", "finetune_gpt2"], capsys)["parameters"] == 124_439_808


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.max_steps", "5000"], ["blocks compiled by inductor"]),
        (["--trainer.max_steps", "1000"], []),
        (["--model.compile_backend", "none"], []),
        (["--model.compile_backend", "none", "--data.document_mask", "true"], ["attention that documents"]),
        (["--model.compile_backend", "none", "--data.batch_size", "1"], ["a host's time to start kernels"]),
    ],
)
def test_what_a_plan_does_not_count_is_told(
    words: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = [*H100, "--config", "gpt2_small", "--trainer.accumulate_grad_batches", "1", *words]
    found = planned([*recipe, "--data.batch_size", "64", *words], capsys)["not_counted"]
    assert len(found) == len(said) and all(text.startswith(start) for text, start in zip(found, said))


def test_what_does_not_fit_is_told_with_what_would(
    capsys: pytest.CaptureFixture[str], tiny_config: Callable[..., Path]
) -> None:
    words = ["--config", "gpt2_xl_tp2", "--trainer.strategy", "auto", "--trainer.devices", "8", "--device"]
    main(["plan", *words, "l4"])
    said = capsys.readouterr().out
    ours = "--trainer.strategy gpt_lightning.TensorParallelDDPStrategy"
    cut = f"{ours} --trainer.strategy.tensor_parallel_size 2"
    assert "DOES NOT FIT" in said and f"{cut} --trainer.accumulate_grad_batches 240: " in said
    main(["plan", *words, "h100"])
    said = capsys.readouterr().out
    assert "fits" in said and "DOES NOT FIT" not in said and "would make it fit" not in said


def test_more_nodes_and_slower_links_take_their_time(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "gpt2_small", "--trainer.devices", "8", "--device", "h100"]
    words += ["--trainer.accumulate_grad_batches", "1", "--data.batch_size", "1"]
    plans = [planned([*words, *more], capsys) for more in ([], ["--nodes", "4"])]
    plans.append(planned([*words, "--nodes", "4", "--node_link_gb", "1"], capsys))
    shares = [plan["exposed_seconds_a_step"] / plan["seconds_a_step"] for plan in plans]
    assert 0 <= shares[0] < shares[1] < shares[2] < 1
    sent = plans[2]["bytes_sent_a_step"]["gradients"]
    assert sent == pytest.approx(2 * 31 / 32 * 4 * 124_439_808)
    assert plans[2]["message_seconds_a_step"] == pytest.approx(sent / 0.8e9)


def test_weights_that_are_gathered_rounded_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "gpt2_xl_8gpu", "--device", "rtx4090"]
    whole, narrow = (planned([*words, *more], capsys) for more in ([], ROUNDED))
    assert whole["memory"]["narrow_weights"] > 2.7 * 2**30 and narrow["memory"]["narrow_weights"] == 0
    assert narrow["memory"]["peak"] < whole["memory"]["peak"] - whole["memory"]["narrow_weights"]
    assert narrow["bytes_sent_a_step"]["weights"] < 0.6 * whole["bytes_sent_a_step"]["weights"]
    assert gather_is_told(whole) and not gather_is_told(narrow)
    main(["plan", *words, *ROUNDED])
    assert "replicas share all, gathered in bf16" in capsys.readouterr().out


def gather_is_told(plan: dict[str, Any]) -> bool:
    changes = [*plan["remedies"], plan["proposal"]]
    return any("--trainer.strategy.gather_dtype bf16" in change["options"] for change in changes if change)


@pytest.mark.slow
def test_this_machine_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(["--data.batch_size", "2"], capsys)
    assert plan["measured"] and plan["device"]["name"] in ("cpu", plan["device"]["name"])
    assert plan["tokens_per_second"] > 0
