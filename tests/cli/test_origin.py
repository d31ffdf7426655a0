"""Begins runs with the weights of another model, and holds them to what is true from the first step on."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from gpt_lightning.__main__ import main
from gpt_lightning.callbacks.initial_weights import InitialWeights
from gpt_lightning.checkpoint.checkpoint import Checkpoint, load_model
from gpt_lightning.cli.config_file import complete_words
from gpt_lightning.data.datamodule import TextDataModule
from tests.distributed import run_ranks
from tests.huggingface.gpt2_folders import write_gpt2

pytestmark = pytest.mark.slow
Config = Callable[..., Path]


@pytest.fixture
def config(tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Without an architecture and a tokenizer; beside it `theirs`, a padded vocabulary, and `x.ckpt`."""
    monkeypatch.chdir(tmp_path)
    path = tiny_config(trainer={"max_steps": 3, "val_check_interval": 3, "accumulate_grad_batches": 1})
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings["model"]["config"] = {"dropout": 0.0}  # the fine-tuning's is another
    del settings["data"]["tokenizer"]
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    write_gpt2(tmp_path / "theirs", vocab_size=301)
    main(["import-hf", "theirs", "x.ckpt"])
    return str(path)


def losses(run: str, name: str = "train/loss") -> list[float]:
    events = EventAccumulator(str(Path("checkpoints") / run / "logs"))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


def first_batch_loss(folder: str, corpus: Path, **options: Any) -> float:
    """Of transformers' model, on the windows that a run begins with."""
    data = TextDataModule(train_files=str(corpus), seq_len=16, batch_size=4, cache_dir="cache", **options)
    data.use_tokenizer(Checkpoint.open(Path("x.ckpt")).tokenizer)
    data.prepare()
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(batch.input_ids).logits
    return float(cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))


def test_a_run_begins_with_the_weights_wherever_they_come_from(
    config: str, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = first_batch_loss("theirs", corpus)
    curves = []
    for name, words in {
        "folder": ["--init_from", "theirs"],
        "imported": ["--init_from", "x.ckpt"],
        "resumed": ["--ckpt_path", "x.ckpt"],
    }.items():
        capsys.readouterr()
        main(["fit", "--config", config, "--run_name", name, *words])
        assert f"starting from the weights of {words[1]}\n" in capsys.readouterr().err
        curves.append(losses(name))
        checkpoint = Checkpoint.open(Path("checkpoints") / name / "last.ckpt")
        assert checkpoint.step == 3 and checkpoint.contents["begun_from"] == "theirs"
        assert checkpoint.config.vocab_size == 301
        assert checkpoint.config.dropout == 0.0  # the command line's, not GPT-2's
        assert checkpoint.contents["TextDataModule"]["consumed_samples"] == 12
    assert curves[0][0] == pytest.approx(expected, abs=1e-5)
    assert curves[0] == curves[1] == curves[2]
    # A trained checkpoint of ours does as well, and its steps do not count.
    main(["fit", "--config", config, "--run_name", "again", "--init_from", "checkpoints/folder/last.ckpt"])
    assert Checkpoint.open(Path("checkpoints/again/last.ckpt")).step == 3
    assert losses("again")[0] < curves[0][0]


def test_the_same_line_begins_a_run_and_goes_on_with_it(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--config", config, "--init_from", "x.ckpt", "--ckpt_path", "last"]
    main(words)
    assert "starting from the weights of x.ckpt" in capsys.readouterr().err
    main([*words, "--trainer.max_steps", "5"])
    captured = capsys.readouterr().err
    assert "resuming: " in captured and "starting from" not in captured and "trains only" not in captured
    checkpoint = Checkpoint.open(Path("checkpoints/tiny/last.ckpt")).contents
    assert checkpoint["global_step"] == 5 and checkpoint["begun_from"] == "theirs"
    # The configuration beside the checkpoint names x.ckpt; what goes on, or is judged, is the checkpoint.
    Path("x.ckpt").unlink()
    main(["validate", "--ckpt_path", "checkpoints/tiny/last.ckpt"])
    main(["fit", "--ckpt_path", "checkpoints/tiny/last.ckpt", "--trainer.max_steps", "6"])
    assert Checkpoint.open(Path("checkpoints/tiny/last.ckpt")).step == 6


def test_without_a_configuration_given_weights_are_fine_tuned(config: str) -> None:
    for words in (["--init_from", "theirs"], ["--ckpt_path", "x.ckpt"]):
        (verb, *rest), beneath = complete_words(["fit", *words])
        assert (verb, rest[:2]) == ("fit", words)
        assert beneath is not None and beneath.stem == "finetune_gpt2"
    # The newest one may be an imported one, of which the fine-tuning's own name of weights must not win.
    Path("checkpoints").mkdir()
    Path("x.ckpt").rename("checkpoints/x.ckpt")
    assert complete_words(["fit", "--ckpt_path", "last"])[0][-2:] == ["--ckpt_path", "checkpoints/x.ckpt"]


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(words)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and "Traceback" not in captured.err
    return [line for line in captured.err.splitlines() if line.startswith("error: ")][0]


def test_what_contradicts_the_weights_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", "--config", config]
    message = fails([*fit, "--init_from", "x.ckpt", "--model.config.n_layers", "3"], capsys)
    assert "model.config.n_layers=3 contradicts x.ckpt, which has 2" in message
    message = fails([*fit, "--init_from", "theirs", "--data.tokenizer", "bpe:300"], capsys)
    assert "data.tokenizer=bpe:300 contradicts theirs, which has theirs" in message
    message = fails([*fit, "--init_from", "x.ckpt", "--data.seq_len", "64"], capsys)
    assert "data.seq_len=64 is over model.config.max_position_embeddings=32" in message
    assert "init_from=none.ckpt is not a file" in fails([*fit, "--init_from", "none.ckpt"], capsys)
    assert "init_from=./none is not there" in fails([*fit, "--init_from", "./none"], capsys)
    assert "init_from=~nosuchuser/x is not there" in fails([*fit, "--init_from", "~nosuchuser/x"], capsys)
    message = fails([*fit, "--init_from", "theirs", "--ckpt_path", "x.ckpt"], capsys)
    assert "init_from=theirs begins a run, and ckpt_path=x.ckpt goes on with one; leave one out" in message
    others = {"quantize": "int8", "num_samples": "2", "logprobs": "true", "top_logprobs": "5"}
    for name, value in others.items():
        message = fails([*fit, "--init_from", "x.ckpt", f"--generation.{name}", value], capsys)
        assert f"generation.{name}=" in message and "is for predict and generate" in message
    message = fails(["validate", "--init_from", "x.ckpt"], capsys)
    assert "init_from=x.ckpt begins a fit; for validate give --ckpt_path" in message
    assert not Path("checkpoints").exists()
    torch.save({**Checkpoint.open(Path("x.ckpt")).contents, "global_step": 7}, "weights.ckpt")
    message = fails([*fit, "--ckpt_path", "weights.ckpt"], capsys)
    assert "from which no run can go on; begin a new one with them: --init_from weights.ckpt" in message


def test_perplexity_of_a_text_is_that_of_the_exported_model(
    config: str, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export-hf", "x.ckpt", "back"])
    rows = corpus.read_text(encoding="utf-8").splitlines()[:7]
    Path("held_out.jsonl").write_text("\n".join(rows), encoding="utf-8")
    capsys.readouterr()
    main(["validate", "--config", config, "--ckpt_path", "x.ckpt", "--data.val_files", "held_out.jsonl"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "val/loss" in line]
    _, tokenizer = load_model(Path("x.ckpt"))
    theirs = AutoModelForCausalLM.from_pretrained("back")
    tokens: list[int] = []
    for row in rows:
        tokens += [*tokenizer.encode(yaml.safe_load(row)["text"]), tokenizer.eos_token_id]
    nll, scored = 0.0, 0
    # Windows of 16 targets from the first token on; the first token of all is asked after an end of text.
    context = [tokenizer.eos_token_id, *tokens]
    for start in range(0, len(tokens), 16):
        targets = torch.tensor(tokens[start : start + 16])
        with torch.no_grad():
            logits = theirs(torch.tensor([context[start : start + len(targets)]])).logits[0]
        nll += float(cross_entropy(logits.double(), targets, reduction="sum"))
        scored += len(targets)
    assert math.exp(float(line.split("│")[2])) == pytest.approx(math.exp(nll / scored), rel=1e-5)


def test_several_processes_begin_alike_and_a_sharded_checkpoint_is_exported(config: str) -> None:
    fit = ["fit", "--config", config, "--init_from", "x.ckpt", "--run_name"]
    main([*fit, "one"])
    ddp = "--trainer.strategy ddp --trainer.devices 2 --data.batch_size 2".split()
    run_ranks(main, 2, [*fit, "ddp", *ddp])
    assert losses("ddp") == pytest.approx(losses("one"), abs=2e-6)
    strategy = ["--trainer.strategy", "gpt_lightning.TensorParallelDDPStrategy", "--trainer.devices", "2"]
    strategy += ["--trainer.strategy.tensor_parallel_size", "2", "--trainer.strategy.save_sharded", "true"]
    run_ranks(main, 2, [*fit, "two", *strategy])
    assert losses("two") == pytest.approx(losses("one"), abs=2e-6)
    assert losses("two", "val/loss") == pytest.approx(losses("one", "val/loss"), abs=1e-6)
    main(["export-hf", "checkpoints/two/last.ckpt", "two"])
    main(["consolidate", "--ckpt_path", "checkpoints/two/last.ckpt", "--output", "two.ckpt"])
    fit = ["fit", "--config", config, "--init_from"]
    main([*fit, "two.ckpt", "--run_name", "whole"])
    run_ranks(main, 2, [*fit, "checkpoints/two/last.ckpt", "--run_name", "parts", *strategy])
    assert losses("parts") == pytest.approx(losses("whole"), abs=2e-6)
    ids = torch.randint(301, (2, 30), generator=torch.Generator().manual_seed(0))
    theirs, (ours, _) = AutoModelForCausalLM.from_pretrained("two"), load_model(Path("two.ckpt"))
    assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)
    card = Path("two/README.md").read_text(encoding="utf-8")
    loss = losses("two", "val/loss")[-1]
    assert f"Perplexity **{math.exp(loss):,.2f}**" in card and "at step 3 of 3" in card
    assert "begun from: the weights of `theirs`" in card and "training text: `corpus.jsonl`" in card
    assert "3 optimizer steps, 12 windows of 16 tokens (192 tokens)" in card


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_would_load_nothing_are_refused(strategy: type[Strategy]) -> None:
    trainer = SimpleNamespace(strategy=strategy())
    callback = InitialWeights("gpt2", {"state_dict": {}})
    with pytest.raises(ValueError, match=f"trainer.strategy={strategy.__name__} cannot .*=gpt2; use ddp"):
        callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
