"""What loggers show of runs, read as TensorBoard, W&B and MLflow read it."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from tensorboard.summary.writer.event_file_writer import AtomicCounter

from gpt_lightning.__main__ import main
from gpt_lightning.callbacks.overview import RESULTS, Overview
from gpt_lightning.training.module import GPTLightningModule

ROW: dict[str, Any] = {"learning_rate": 0.01, "n_layers": 2, "tokenizer": "bytes"}


def tensorboard_context(folder: Path) -> TBContext:
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    return TBContext(data_provider=provider, multiplexer=multiplexer, flags=None)


def shown_experiment(context: backend_context.Context) -> Any:
    metadata = context.hparams_metadata(RequestContext(), "")
    return context.experiment_from_metadata(RequestContext(), "", True, metadata, [])


def table(folder: Path) -> list[dict[str, Any]]:
    """The rows of TensorBoard's table HParams, by its own backend."""
    request, context = RequestContext(), backend_context.Context(tensorboard_context(folder))
    experiment = shown_experiment(context)
    columns = [api_pb2.ColParams(metric=each.name) for each in experiment.metric_infos]
    statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS]
    asked = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=100, col_params=columns, allowed_statuses=statuses
    )
    shown = {each.name for each in experiment.hparam_infos}
    rows = []
    for group in list_session_groups.Handler(request, context, "", asked).run().session_groups:
        values = {name: value.number_value or value.string_value for name, value in group.hparams.items()}
        results = {value.name.tag: value.value for value in group.metric_values}
        rows.append({name: value for name, value in values.items() if name in shown} | results)
    return rows


def start(logger: TensorBoardLogger, row: dict[str, Any]) -> None:
    trainer = SimpleNamespace(is_global_zero=True, loggers=[logger])
    Overview(row).on_fit_start(cast(Trainer, trainer), cast(GPTLightningModule, None))
    logger.experiment.flush()


def test_a_run_that_goes_on_has_a_row_from_its_start_and_no_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of one process and second are read in the order of names that end in a count: 10 before 9.
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer._global_uid", AtomicCounter(0))
    for run, loss in (("one", 3.0), ("two", 2.0)):
        logger = TensorBoardLogger(tmp_path / run, name="logs", version="", default_hp_metric=False)
        start(logger, ROW)
        assert ROW in table(tmp_path)  # a killed one
        logger.log_metrics({"val/loss": 9.0}, 1)
        # As a run that was resumed.
        logger = TensorBoardLogger(tmp_path / run, name="logs", version="", purge_step=1)
        start(logger, ROW)
        logger.log_metrics({"val/loss": loss, "val/bpb": loss / 2, "throughput/tokens_per_second": 99.0}, 1)
        logger.experiment.flush()
    rows = sorted(table(tmp_path), key=lambda row: float(row["val/loss"]))
    results = [dict(zip(RESULTS, (loss, loss / 2, 99.0))) for loss in (2.0, 3.0)]
    assert rows == [ROW | each for each in results]


def test_the_table_begins_with_what_is_varied_most(tmp_path: Path) -> None:
    row = {"activation": "gelu", "batch_size": 8, "d_model": 64, "bias": "False", **ROW, "seq_len": 64}
    start(TensorBoardLogger(tmp_path, name="logs", version=""), row)
    experiment = shown_experiment(backend_context.Context(tensorboard_context(tmp_path)))
    names = [column.name for column in experiment.hparam_infos]
    assert names[:5] == ["batch_size", "d_model", "learning_rate", "n_layers", "seq_len"]
    assert {*names} == {*row}


def test_tensorboards_page_begins_with_both_losses_in_one_plot(tmp_path: Path) -> None:
    start(TensorBoardLogger(tmp_path, name="logs", version=""), ROW)
    plugin = CustomScalarsPlugin(tensorboard_context(tmp_path))
    layout = json.loads(plugin.layout_impl(RequestContext(), ""))
    assert [category["title"] for category in layout["category"]][:3] == [
        *("loss", "generation", "throughput"),
    ]
    first = layout["category"][0]["chart"][0]
    assert first["title"] == "loss" and first["multiline"]["tag"] == ["train/loss$", "val/loss$"]


Config = Callable[..., Path]


def fit(config: Path, logger: str, **init_args: Any) -> None:
    spec = {"class_path": f"lightning.pytorch.loggers.{logger}", "init_args": init_args}
    main(["fit", "--config", str(config), "--trainer.logger", json.dumps(spec)])


def check_row(row: dict[str, Any]) -> None:
    assert (int(row["n_layers"]), int(row["d_model"]), row["tokenizer"]) == (2, 16, "bpe:300")
    assert float(row["learning_rate"]) == 0.01 and row["train_files"] == "corpus.jsonl"
    assert not {"vocab_size", "layer_norm_eps", "config/layer_norm_eps", "cache_dir"} & row.keys()


@pytest.mark.slow
def test_a_run_resumed_by_the_command_line_has_one_row_with_its_last_results(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", str(tiny_config())]
    main([*words, "--trainer.max_steps", "3"])
    main([*words, "--ckpt_path", "last"])
    (row,) = table(tmp_path / "checkpoints")
    check_row(row)
    events = EventAccumulator(str(tmp_path / "checkpoints" / "tiny" / "logs"))
    events.Reload()
    assert {name: row[name] for name in RESULTS} == {name: events.Scalars(name)[-1].value for name in RESULTS}
    assert [event.step for event in events.Scalars("val/loss")] == [3, 6]  # and no point of the table's own


@pytest.mark.slow
def test_a_csv_has_the_same_row(tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tiny_config(), "CSVLogger", save_dir=str(tmp_path), name="csv", version="")
    check_row(yaml.safe_load((tmp_path / "csv" / "hparams.yaml").read_text()))
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        measured = [*csv.DictReader(file)]
    assert all(any(row[name] for row in measured) for name in RESULTS)


@pytest.mark.slow
def test_weights_and_biases_has_the_same_row(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    told: dict[str, Any] = {}
    finish = wandb.sdk.wandb_run.Run.finish

    def finishing(run: Any, *args: Any, **options: Any) -> None:
        told.update(config=dict(run.config), summary={name: run.summary.get(name) for name in RESULTS})
        finish(run, *args, **options)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "finish", finishing)
    fit(tiny_config(), "WandbLogger", save_dir=str(tmp_path), offline=True)
    wandb.finish()
    check_row(told["config"])
    assert all(isinstance(value, float) for value in told["summary"].values())


@pytest.mark.slow
def test_mlflow_has_the_same_row(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = f"file:{tmp_path / 'mlruns'}"
    fit(tiny_config(), "MLFlowLogger", tracking_uri=store, experiment_name="ours")
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("ours")
    (run,) = client.search_runs([experiment.experiment_id])
    check_row(run.data.params)
    assert {*RESULTS} <= run.data.metrics.keys()
