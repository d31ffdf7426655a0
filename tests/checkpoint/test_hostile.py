"""What a file says is held to what a run needs before anything of it is used, and refused in one line."""

import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt_lightning.__main__ import main
from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.checkpoint.contents import VERSION, VERSION_KEY
from gpt_lightning.checkpoint.files import write
from gpt_lightning.checkpoint.io import DurableCheckpointIO
from gpt_lightning.checkpoint.optimizer_state import problems_of_sizes
from gpt_lightning.checkpoint.runs import step_of
from gpt_lightning.checkpoint.weights import groups_of_ours
from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer, build_schedule
from tests.conftest import write_corpus

OLD = Path(__file__).parents[1] / "old_files" / "file.ckpt"
Change = Callable[[dict[str, Any]], object]
MOMENT = ("optimizer_states", 0, "state", 2, "exp_avg")
GROUP = ("optimizer_states", 0, "param_groups", 1)
ENTRIES = ("optimizer_states", 0, "state")
WEIGHT = ("state_dict", "model.blocks.0.attn.qkv_proj.weight")
HEAD = ("state_dict", "model.lm_head.weight")
RANDOM = ("resume", "random_states", 0)
SCHEDULE = ("lr_schedulers", 0)
PROGRESS = ("loops", "fit_loop", "epoch_loop.batch_progress")
SAVER = (
    "callbacks",
    "RunCheckpoint{'monitor': 'val/loss', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
    "'train_time_interval': None}",
)
GONE = object()


@pytest.fixture
def trained() -> dict[str, Any]:
    """The checkpoint of a run at step 5, as version 0.1 wrote it."""
    contents: dict[str, Any] = torch.load(OLD, weights_only=True)
    return contents


def put(contents: Any, place: tuple[Any, ...], value: Any) -> None:
    """Puts a value, or what a function makes of the former one, somewhere into nested containers."""
    *way, last = place
    for key in way:
        contents = contents[key]
    if value is GONE:
        del contents[last]
    elif callable(value):
        contents[last] = value(contents[last] if isinstance(contents, list) else contents.get(last))
    else:
        contents[last] = value


def complaint(path: Path) -> str:
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        Checkpoint.open(path)
    assert time.monotonic() - began < 5
    message = str(error.value)
    assert message.startswith(f"ckpt_path={path} ") and "\n" not in message and len(message) < 600
    return message


def strided(tensor: Tensor) -> Tensor:
    return torch.zeros(1).expand(tensor.shape)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def overlapping(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.numel()).as_strided(tensor.shape, (1, 1))


def quantized(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def shared(states: dict[int, Any]) -> dict[int, Any]:
    return {**states, 2: {**states[2], "exp_avg": states[2]["exp_avg_sq"]}}


def evading(state: dict[str, Any]) -> dict[str, Any]:
    """Lacks what tells AdamW's groups by, and then what AdamW needs."""
    del state["param_groups"][1]["amsgrad"], state["state"][10]["exp_avg_sq"]
    return state


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def circle(value: Any) -> Any:
    parts: list[Any] = []
    parts.append({"again": parts})
    return parts


def doubled(value: Any) -> Any:
    """Two lists of two lists ... of the same ones: small in a file, endless for who walks through it."""
    parts: list[Any] = []
    for _ in range(60):
        parts = [parts, parts]
    return parts


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "stride 0": strided,
    "35 TB": lambda tensor: torch.zeros(1).expand(3_000_000, 3_000_000),
    "overlapping": overlapping,
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": Tensor.to_sparse,
    "sparse rows": Tensor.to_sparse_csr,
    "quantized": quantized,
    "complex": lambda tensor: tensor.to(torch.complex64),
    "bool": Tensor.bool,
    "whole numbers": Tensor.int,
    "one byte": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "one element": lambda tensor: torch.zeros(1),
    "another shape": lambda tensor: tensor.flatten(),
    "a number": 3.0,
    "a list": [1.0],
    "nothing": None,
}
CHANGES: list[tuple[str, tuple[Any, ...], Any]] = [
    *((f"weight: {name}", WEIGHT, value) for name, value in TENSORS.items()),
    *((f"moment: {name}", MOMENT, value) for name, value in TENSORS.items()),
    ("moment: transposed", MOMENT, transposed),
    ("moment: float16", MOMENT, Tensor.half),
    ("moment: shared", ENTRIES, shared),
    ("moment: needs gradients", MOMENT, lambda tensor: torch.nn.Parameter(tensor)),
    ("head: another", HEAD, lambda tensor: tensor + 1),
    *((f"weights: {value}", ("state_dict",), value) for value in (7, None, {}, [1])),
    ("weights: gone", ("state_dict",), GONE),
    ("weights: no name", ("state_dict", 3), torch.zeros(1)),
    ("step: nan", (*ENTRIES, 2, "step"), torch.tensor(float("nan"))),
    ("step: many", (*ENTRIES, 2, "step"), torch.ones(3)),
    ("step: below 0", (*ENTRIES, 2, "step"), torch.tensor(-1.0)),
    ("step: one byte", (*ENTRIES, 2, "step"), torch.tensor(-1.0).to(torch.float8_e4m3fn)),
    ("step: a word", (*ENTRIES, 2, "step"), "x"),
    ("entry: lacks a moment", MOMENT, GONE),
    ("entry: one more", (*ENTRIES, 2, "max_exp_avg_sq"), torch.zeros(48, 16)),
    ("entry: none", (*ENTRIES, 2), GONE),
    ("entry: empty", (*ENTRIES, 2), {}),
    ("entry: of no parameter", (*ENTRIES, 99), {}),
    ("entry: of a name", (*ENTRIES, "x"), {}),
    ("entry: a list", (*ENTRIES, 2), [1]),
    ("entries: a list", ENTRIES, []),
    ("group: one less", ("optimizer_states", 0, "param_groups"), lambda groups: groups[:1]),
    ("group: a number", GROUP, 7),
    ("group: twice the same", (*GROUP, "params"), lambda params: params[:1] * len(params)),
    ("group: another order", (*GROUP, "params"), lambda params: params[::-1]),
    ("group: no numbers", (*GROUP, "params"), ["x"]),
    *((f"group: no {name}", (*GROUP, name), GONE) for name in ("lr", "eps", "weight_decay")),
    *(
        (f"group: {name} a word", (*GROUP, name), "x")
        for name in ("lr", "betas", "eps", "initial_lr", "fused")
    ),
    ("group: initial_lr 0", (*GROUP, "initial_lr"), 0.0),
    ("group: lr nan", (*GROUP, "lr"), float("nan")),
    ("group: lr beyond all floats", (*GROUP, "lr"), 10**400),
    ("group: amsgrad", (*GROUP, "amsgrad"), True),
    ("optimizers: a number", ("optimizer_states",), 7),
    ("optimizers: numbers", ("optimizer_states",), [7]),
    ("optimizers: empty", ("optimizer_states", 0), {}),
    *(
        (f"global_step: {value}", ("global_step",), value)
        for value in (float("nan"), 2**63, -1, "5", True, None, 6)
    ),
    *((f"epoch: {value}", ("epoch",), value) for value in (float("nan"), 2**63, -1, "x")),
    *(
        (f"version of lightning: {value}", ("pytorch-lightning_version",), value)
        for value in (None, 2, "x", "0.7.1")
    ),
    *((f"loops: {value}", ("loops",), value) for value in ({}, 7, None, [])),
    *(
        (f"{key}: {{}}", ("loops", key), {})
        for key in ("fit_loop", "validate_loop", "test_loop", "predict_loop")
    ),
    *(
        (f"progress: {value}", (*PROGRESS, "total", "ready"), value)
        for value in (float("nan"), -1, "x", 2**63)
    ),
    ("progress: gone", (*PROGRESS, "current"), GONE),
    ("loops: no steps", ("loops", "fit_loop", "epoch_loop.state_dict"), {}),
    *((f"schedulers: {value}", ("lr_schedulers",), value) for value in ({}, 7, [7], [{}])),
    *((f"schedule: no {name}", (*SCHEDULE, name), GONE) for name in ("base_lrs", "last_epoch")),
    *(
        (f"schedule: {name} a word", (*SCHEDULE, name), "x")
        for name in ("base_lrs", "last_epoch", "lr_lambdas", "_last_lr")
    ),
    ("schedule: another length", (*SCHEDULE, "base_lrs"), [0.1]),
    ("schedule: below 0", (*SCHEDULE, "base_lrs"), [-0.1, -0.1]),
    ("schedule: a method", (*SCHEDULE, "get_lr"), 1),
    ("schedule: an optimizer", (*SCHEDULE, "optimizer"), 1),
    ("schedule: a function's", (*SCHEDULE, "lr_lambdas"), [{"a": 1}, None]),
    *((f"resume: {value}", ("resume",), value) for value in ({}, 7, [])),
    *((f"random: {value}", ("resume", "random_states"), value) for value in ({}, [], [7], [{}])),
    ("random: torch's floats", (*RANDOM, "torch"), Tensor.float),
    ("random: torch's too short", (*RANDOM, "torch"), lambda state: state[:9]),
    ("random: torch's zeros", (*RANDOM, "torch"), torch.zeros_like),
    ("random: python's", (*RANDOM, "python"), (3, (1, 2), None)),
    ("random: python's next", (*RANDOM, "python"), lambda state: (*state[:2], "x")),
    ("random: numpy's kind", (*RANDOM, "numpy"), lambda state: ("PCG64", *state[1:])),
    ("random: numpy's place", (*RANDOM, "numpy"), lambda state: (*state[:2], 10**6, *state[3:])),
    ("random: numpy's numbers", (*RANDOM, "numpy"), lambda state: (state[0], [1.5], *state[2:])),
    ("random: device's", (*RANDOM, "device"), "x"),
    ("random: no device", (*RANDOM, "device"), GONE),
    ("resume: metrics", ("resume", "monitored"), {"val/loss": "x"}),
    ("resume: samples", ("resume", "samples_per_step"), "x"),
    ("resume: a flag", ("resume", "validation_is_due"), 3),
    *((f"callbacks: {value}", ("callbacks",), value) for value in (7, [], {"x": 7}, {1: {}})),
    ("guard: a word", ("callbacks", "FiniteGuard", "skipped_steps"), "x"),
    *(
        (f"saver: {value}", (*SAVER, "best_k_models"), value)
        for value in (7, {"a": "x"}, {"a": torch.ones(2)}, {3: 1.0})
    ),
    *((f"saver: {name}", (*SAVER, name), 7) for name in ("dirpath", "best_model_path", "last_model_path")),
    ("saver: no path", (*SAVER, "kth_best_model_path"), GONE),
    *((f"position: {value}", ("TextDataModule", "batches"), value) for value in (-1, "x", None, 2**63)),
    ("position: gone", ("TextDataModule", "consumed_samples"), GONE),
    *((f"text: {value}", ("TextDataModule", "text"), value) for value in (7, [], {"train_files": 3})),
    ("text: names", ("TextDataModule", "text", "train_files"), ["x"]),
    *((f"seed: {value}", ("TextDataModule", "settings", "seed"), value) for value in ("x", 1.5, -1, True)),
    *(
        (f"val_fraction: {value}", ("TextDataModule", "settings", "val_fraction"), value)
        for value in ("x", 2, float("nan"))
    ),
    ("seq_len: 0", ("TextDataModule", "settings", "seq_len"), 0),
    ("tokenizer: 7", ("TextDataModule", "settings", "tokenizer"), 7),
    ("another setting", ("TextDataModule", "settings", "cache_dir"), "/elsewhere"),
    *((f"validation: {value}", ("last_validation",), value) for value in (7, {"step": "x"})),
    ("origin: 7", ("begun_from",), 7),
    ("hyper-parameters: another model", ("hyper_parameters", "config", "n_layers"), 10**9),
    ("hyper-parameters: a list", ("hyper_parameters",), [1]),
    ("hyper-parameters: their class", ("hparams_type",), 7),
    ("a folder's key", ("sharded_folder",), "/elsewhere"),
    ("deep", ("more",), nested(150)),
    ("deep in hyper-parameters", ("hyper_parameters", "a"), nested(150)),
    ("a circle", ("more",), circle),
    ("doubled", ("more",), doubled),
]


TOKENIZERS: dict[str, tuple[str, Any]] = {
    "no JSON": ("tokenizer_json", "{"),
    "no eos_token": ("eos_token", "<nowhere>"),
    "an empty eos_token": ("eos_token", ""),
    "an end beyond the model": ("eos_token_ids", [300]),
    "an id beyond the model": ("tokenizer_json", lambda text: text.replace('"A":33', '"A":5000')),
}


@pytest.mark.parametrize("name, value", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_a_tokenizer_of_another_model_is_refused(
    name: str, value: Any, trained: dict[str, Any], tmp_path: Path
) -> None:
    put(trained, ("TextDataModule", "tokenizer", name), value)
    write(trained, tmp_path / "evil.ckpt")
    with pytest.raises(UserError) as error:
        print(Checkpoint.open(tmp_path / "evil.ckpt").tokenizer)
    assert str(error.value).startswith(f"ckpt_path={tmp_path}/evil.ckpt") and "\n" not in str(error.value)


# What a class of one's own may have saved too: it is compared with the run's optimizer when that is built.
LATE: list[tuple[str, tuple[Any, ...], Any]] = [
    (
        "group: one more",
        ("optimizer_states", 0, "param_groups"),
        lambda groups: [*groups, {**groups[0], "params": []}],
    ),
    (
        "group: one",
        ("optimizer_states", 0, "param_groups"),
        lambda groups: [{**groups[0], "params": [*range(16)]}],
    ),
    ("group: maximize", (*GROUP, "maximize"), True),
    ("optimizers: none", ("optimizer_states",), []),
    ("optimizers: two", ("optimizer_states",), lambda states: states * 2),
    ("group: evading", ("optimizer_states", 0), evading),
    ("schedulers: none", ("lr_schedulers",), []),
    ("recipe: a word", ("hyper_parameters", "optimizer", "learning_rate"), "x"),
    ("schedule: no lambdas", (*SCHEDULE, "lr_lambdas"), GONE),
]


@pytest.mark.parametrize(
    "place, value", [change[1:] for change in CHANGES], ids=[change[0] for change in CHANGES]
)
def test_what_does_not_fit_is_refused_in_one_line(
    place: tuple[Any, ...], value: Any, trained: dict[str, Any], tmp_path: Path
) -> None:
    put(trained, place, value)
    torch.save(trained, tmp_path / "evil.ckpt")
    complaint(tmp_path / "evil.ckpt")


def test_what_is_another_but_no_worse_passes(trained: dict[str, Any], tmp_path: Path) -> None:
    """Weights may lie in memory as they like, and a head beside its table if it is equal."""
    put(trained, WEIGHT, transposed)
    put(trained, HEAD, Tensor.clone)
    put(trained, (*RANDOM, "device"), torch.zeros(16, dtype=torch.uint8))
    put(trained, (*GROUP, "decoupled_weight_decay"), GONE)
    put(trained, ("optimizer_states", 0, "state"), {})
    write(trained, tmp_path / "x.ckpt")
    assert Checkpoint.open(tmp_path / "x.ckpt").step == 5


@pytest.fixture
def with_muon(trained: dict[str, Any]) -> dict[str, Any]:
    """The same with the state of a run with Muon."""
    model = GPTModel(GPTConfig(**trained["gpt_config"]))
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    schedule = build_schedule(optimizer, ScheduleConfig(2), horizon=10)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule.step()
    states = {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [schedule.state_dict()]}
    return {**trained, **states}


OF_MUON = ("optimizer_states", 0, "param_groups", 2)
MATRIX = (*ENTRIES, 13)
MUON_CHANGES: dict[str, tuple[tuple[Any, ...], Any]] = {
    **{f"buffer: {name}": ((*MATRIX, "momentum_buffer"), value) for name, value in TENSORS.items()},
    "buffer: float16": ((*MATRIX, "momentum_buffer"), Tensor.half),
    "buffer: gone": ((*MATRIX, "momentum_buffer"), GONE),
    "entry: none": (MATRIX, GONE),
    "entry: AdamW's": (MATRIX, {name: torch.zeros(()) for name in ("step", "exp_avg", "exp_avg_sq")}),
    "entry: one more": ((*MATRIX, "step"), torch.zeros(())),
    "AdamW's: a buffer": ((*ENTRIES, 0, "momentum_buffer"), torch.zeros(1)),
    **{f"momentum: {value}": ((*OF_MUON, "momentum"), value) for value in ("x", 1.0, -0.1, float("nan"))},
    **{f"{name}: a word": ((*OF_MUON, name), "x") for name in ("lr", "weight_decay", "initial_lr")},
    "no lr": ((*OF_MUON, "lr"), GONE),
    "schedule: AdamW's": ((*SCHEDULE, "base_lrs"), [0.1, 0.1]),
}


@pytest.mark.parametrize("change", MUON_CHANGES)
def test_a_state_of_muon_is_held_to_its_model(
    change: str, with_muon: dict[str, Any], tmp_path: Path
) -> None:
    write(with_muon, tmp_path / "honest.ckpt")
    assert Checkpoint.open(tmp_path / "honest.ckpt").step == 5
    put(with_muon, *MUON_CHANGES[change])
    torch.save(with_muon, tmp_path / "evil.ckpt")
    complaint(tmp_path / "evil.ckpt")


def test_the_sizes_of_a_sharded_state_of_muon_are_held_to_its_model(with_muon: dict[str, Any]) -> None:
    groups = groups_of_ours(with_muon["gpt_config"], with_muon["state_dict"])
    sizes = {
        f"optimizer_states/0/{index}/{name}": list(value.shape)
        for index, entry in with_muon["optimizer_states"][0]["state"].items()
        for name, value in entry.items()
    }
    assert [*problems_of_sizes(with_muon, sizes, groups)] == []
    key = "optimizer_states/0/13/momentum_buffer"
    (problem,) = problems_of_sizes(with_muon, {**sizes, key: [1, 1]}, groups)
    assert f"holds {key} of the size [1, 1] instead of" in problem
    del sizes[key]
    (problem,) = problems_of_sizes(with_muon, sizes, groups)
    assert f"holds {key} of the size None instead of" in problem


@pytest.mark.slow
@pytest.mark.parametrize("place, value", [change[1:] for change in LATE], ids=[change[0] for change in LATE])
def test_what_does_not_fit_the_run_is_refused_before_a_step(
    place: tuple[Any, ...],
    value: Any,
    trained: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus.jsonl")
    put(trained, place, value)
    run = tmp_path / "checkpoints" / "file"
    write(trained, run / "last.ckpt")
    before = (run / "last.ckpt").read_bytes()
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", str(OLD.with_name("old.yaml")), "--run_name", "file", "--ckpt_path", "last"])
    message = capsys.readouterr().err
    assert exit.value.code == 2 and "Traceback" not in message
    (line,) = [line for line in message.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: ckpt_path=checkpoints/file/last.ckpt ")
    assert [path.name for path in run.glob("*.ckpt")] == ["last.ckpt"]
    assert (run / "last.ckpt").read_bytes() == before


# ---- versions


def test_a_newer_checkpoint_is_refused(trained: dict[str, Any], tmp_path: Path) -> None:
    assert VERSION_KEY not in trained
    newer = {VERSION_KEY: VERSION + 1, "loops": "of another kind"}
    write({**trained, **newer}, tmp_path / "new.ckpt")
    told = f"is of version {VERSION + 1}, and this program reads up to {VERSION}; update gpt_lightning"
    assert told in complaint(tmp_path / "new.ckpt")
    write({**trained, VERSION_KEY: "x"}, tmp_path / "new.ckpt")
    assert "holds checkpoint_version='x'" in complaint(tmp_path / "new.ckpt")
    write({**trained, VERSION_KEY: VERSION}, tmp_path / "x.ckpt")
    Checkpoint.open(tmp_path / "x.ckpt")


# ---- bytes


PICKLES = {
    "marks": b"(" * 10_000_000,
    "lists": b"]" * 10_000_000,
    "deep": b"]" * 1_000_000 + b"a" * 999_999,
    "deep tuples": b")" + b"\x85" * 1_000_000,
    "long word": b"X\xff\xff\xff\xff",
    "memory": b"cbuiltins\nbytearray\n\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85R",
    "tensor": b"ctorch\nTensor\n\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85R",
    "storage": b"ctorch.storage\nUntypedStorage\n\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85R",
    "nothing": b"",
    "an empty stack": b"\x85",
}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("kind", PICKLES)
def test_endless_pickles_are_refused(kind: str, compression: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "evil.ckpt", "w", compression) as archive:
        for name, content in (("data.pkl", b"\x80\x02" + PICKLES[kind] + b"."), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", content)
    complaint(tmp_path / "evil.ckpt")


@pytest.mark.parametrize("record", ["data.pkl", "data/0"])
def test_compressed_or_doubled_records_are_refused(record: str, tmp_path: Path) -> None:
    for change in ("compressed", "twice"):
        with zipfile.ZipFile(OLD) as old, zipfile.ZipFile(tmp_path / f"{change}.ckpt", "w") as new:
            for info in old.infolist():
                is_it = info.filename.endswith(record)
                kind = zipfile.ZIP_DEFLATED if is_it and change == "compressed" else zipfile.ZIP_STORED
                new.writestr(info.filename, old.read(info), kind)
                if is_it and change == "twice":
                    new.writestr(info.filename.upper(), old.read(info))
        assert record in complaint(tmp_path / f"{change}.ckpt")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ckpt")
    assert "is not a file" in complaint(tmp_path / "pipe.ckpt")
    with pytest.raises(UserError):
        DurableCheckpointIO().load_checkpoint(tmp_path / "pipe.ckpt")
    assert step_of(tmp_path / "pipe.ckpt") is None
