"""When a run compiles, that it compiles once for each mode, and that nothing but the speed changes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from gpt_lightning.callbacks.text_samples import TextSamples
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.kernels import attention
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.training.compilation import choose_backend
from gpt_lightning.training.module import GPTLightningModule
from tests.kernels.test_attention import ids_of
from tests.shapes import GROUPED
from tests.training.test_module import Recorder, trainer


@pytest.mark.parametrize(
    ("name", "device", "passes", "can_compile", "backend"),
    [
        (None, "cuda", 2000, True, "inductor"),
        (None, "cuda", math.inf, True, "inductor"),
        (None, "cuda", 1999, True, None),
        (None, "cuda", 6000, False, None),
        (None, "cpu", 6000, False, None),
        (None, "mps", 6000, False, None),
        ("none", "cuda", 6000, True, None),
        ("inductor", "cpu", 1, False, "inductor"),
        ("aot_eager", "cuda", 1, True, "aot_eager"),
    ],
)
def test_a_run_compiles_where_it_pays(
    name: str | None, device: str, passes: float, can_compile: bool, backend: str | None
) -> None:
    assert choose_backend(name, device=device, passes=passes, can_compile=can_compile) == backend


def fit(corpus: Path, folder: Path, seq_len: int = 16, **options: Any) -> tuple[Any, GPTLightningModule, int]:
    """Losses of the steps and the last validation, the module, and how many graphs were compiled.

    After each validation a text is written, a token at a time.
    """
    torch._dynamo.reset()
    counters.clear()
    datamodule = TextDataModule(
        train_files=[str(corpus)],
        cache_dir=str(folder / "cache"),
        tokenizer="bpe:300",
        seq_len=seq_len,
        batch_size=4,
        val_fraction=0.3,
        document_mask=options.pop("document_mask", False),
    )
    torch.manual_seed(1)
    shape = options.pop("shape", {})
    config = GPTConfig(datamodule.vocab_size, seq_len, n_layers=3, n_heads=2, d_model=16, **shape)
    module = GPTLightningModule(config, **options)
    module.generation = GenerationConfig(max_new_tokens=3)
    recorder = Recorder()
    validations = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    run = trainer(folder, max_steps=6, callbacks=[recorder, TextSamples()], **validations)
    run.fit(module, datamodule)
    losses = [logged["train/loss"] for logged in recorder.logged]
    return [*losses, float(run.callback_metrics["val/loss"])], module, counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "checkpointing, document_mask, shape", [(False, False, {}), (True, True, {}), (False, True, GROUPED)]
)
def test_compiled_training_equals_plain_training(
    corpus: Path, tmp_path: Path, checkpointing: bool, document_mask: bool, shape: dict[str, Any]
) -> None:
    options = {"activation_checkpointing": checkpointing, "document_mask": document_mask, "shape": shape}
    plain_losses, plain, no_graphs = fit(corpus, tmp_path, **options)
    assert no_graphs == 0
    losses, module, graphs = fit(corpus, tmp_path, compile_backend="aot_eager", **options)
    assert losses == pytest.approx(plain_losses, abs=1e-6)
    assert graphs == 2, "one to train and one to validate, for all blocks, batches and epochs"
    assert module.state_dict().keys() == plain.state_dict().keys()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_documents_of_any_length_are_not_compiled_anew(corpus: Path, tmp_path: Path) -> None:
    """Long rows go document by document on a CPU, which parts each mode's graph in six."""
    losses, _, graphs = fit(corpus, tmp_path, 512, compile_backend="aot_eager", document_mask=True)
    assert losses == pytest.approx(fit(corpus, tmp_path, 512, document_mask=True)[0], abs=1e-6)
    assert graphs == 2 * 6, "the same ones for all layers and batches"


@pytest.mark.slow
def test_flex_attention_is_compiled_once_for_all_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, save the backward pass, which FlexAttention has not on a CPU."""
    monkeypatch.setattr(attention, "document_mask", lambda positions, *rest: attention.block_mask(positions))
    model = GPTModel(GPTConfig(50, 300, n_layers=3, n_heads=2, d_model=32, **GROUPED)).eval()
    rows = [[[300], [1, 299]], [[150, 150], [299, 1]], [[1, 128, 171], [100, 100, 100]]]
    x = torch.randn(2, 300, 32)

    def outputs() -> list[Tensor]:
        attends = (attention.Attend(x, ids_of(batch), head_dim=16, dropout_p=0.0) for batch in rows)
        return [block(x, each, model.rotary(each.positions)) for block, each in zip(model.blocks, attends)]

    with torch.no_grad():
        expected = outputs()
        torch._dynamo.reset()
        counters.clear()
        for block in model.blocks:
            block.compile(backend="aot_eager")
        torch.testing.assert_close(outputs(), expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
