"""A checkpoint is an ordinary file at any topology, and a run goes on from it at any other."""

import errno
import pickle
import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision

import gpt_lightning.checkpoint.io as checkpoint_io
import gpt_lightning.parallel.full_layout as full_layout
import gpt_lightning.parallel.sharded_layout as sharded_layout
from gpt_lightning.checkpoint.checkpoint import Checkpoint, consolidate, load_model
from gpt_lightning.checkpoint.files import CheckpointWriteError, NonFiniteCheckpointError, write
from gpt_lightning.checkpoint.folder import read_whole, tensors_in
from gpt_lightning.checkpoint.io import DurableCheckpointIO, SaveOptions
from gpt_lightning.checkpoint.runs import newest_checkpoint
from tests.distributed import run_ranks
from tests.parallel.runs import Recorder, Run, build, run_everywhere, trainer_of
from tests.shapes import SHARED

pytestmark = pytest.mark.slow
OneProcess = Callable[..., dict[str, Any]]
STEPS = 16


def half_precision() -> list[MixedPrecision]:
    # Grows every third step, so that a scaler that starts anew is seen; small enough to never overflow.
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**4, growth_interval=3))]


PRECISIONS = {
    "float32": ({}, 2e-6),
    "float16": ({"plugins": half_precision, "config": SHARED}, 4.1e-4),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_goes_on_at_other_topologies(
    precision: str, sharded: bool, shared_corpus: Path, tmp_path: Path, one_process: OneProcess
) -> None:
    """1 -> 2 x 2 -> 4 -> 1 (sharded: 2 x 2 -> 4 -> 2 -> 1 x 2) is one trajectory."""
    extra, tolerance = PRECISIONS[precision]
    options = {"steps": STEPS, "accumulate": 1, **extra}
    one = one_process(**options)
    topologies = [(2, 2), (4, 1), (2, 1), (1, 2)] if sharded else [(1, 1), (2, 2), (4, 1), (1, 1)]
    losses, scales, path = [], [], None
    for number, (tp, dp) in enumerate(topologies):
        target = str(tmp_path / f"{number}.ckpt")
        stop = STEPS // len(topologies) * (number + 1)
        strategy = {"save_sharded": True} if sharded else {}
        run = Run(tp, dp, stop_after=stop, resume_from=path, save_to=target, strategy=strategy, **options)
        first = run_everywhere(run, shared_corpus)[0]
        losses += first["losses"]
        scales += first["scales"]
        path = target
    assert losses == pytest.approx(one["losses"], abs=tolerance, rel=0)
    assert scales == one["scales"]


@pytest.fixture(scope="module")
def saved(shared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same six steps saved by one process, by 2 x 2, and by 2 x 2 sharded."""
    folder = tmp_path_factory.mktemp("saved")
    # With biases and a table of positions, too.
    options: dict[str, Any] = {"steps": 6, "config": {**SHARED, "positions": "learned", "bias": True}}
    runs = {"one": Run(**options), "2x2": Run(2, 2, **options)}
    runs["sharded"] = Run(2, 2, strategy={"save_sharded": True}, **options)
    paths = {name: folder / f"{name}.ckpt" for name in runs}
    for name, run in runs.items():
        run_everywhere(Run(**{**vars(run), "save_to": str(paths[name])}), shared_corpus)
    consolidate(paths["sharded"], folder / "consolidated.ckpt")
    return {**paths, "consolidated": folder / "consolidated.ckpt"}


@pytest.mark.parametrize("name", ["2x2", "consolidated"])
def test_the_file_is_that_of_one_process(name: str, saved: dict[str, Path]) -> None:
    one, other = (Checkpoint.open(saved[which]).contents for which in ("one", name))
    assert one.keys() == other.keys()
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for key, tensor in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][key], tensor, rtol=1e-4, atol=1e-5, msg=key)
    (own,), (theirs,) = one["optimizer_states"], other["optimizer_states"]
    assert own["param_groups"] == theirs["param_groups"]
    assert own["state"].keys() == theirs["state"].keys()
    for index, entry in own["state"].items():
        assert entry.keys() == theirs["state"][index].keys()
        for key, value in entry.items():
            torch.testing.assert_close(theirs["state"][index][key], value, rtol=1e-3, atol=1e-6)
    assert one["TextDataModule"] == other["TextDataModule"] and one["loops"] == other["loops"]


def test_any_model_loads_it(saved: dict[str, Path]) -> None:
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = load_model(saved["one"])[0](ids).logits
    for name in ("2x2", "consolidated"):
        torch.testing.assert_close(load_model(saved[name])[0](ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_tied_tensor_is_written_once(saved: dict[str, Path]) -> None:
    keys = [key for key, _ in tensors_in(saved["sharded"], "state_dict/")]
    assert "state_dict/model.token_embedding.weight" in keys
    assert not any("lm_head" in key for key in keys)
    weights = Checkpoint.open(saved["2x2"]).contents["state_dict"]
    assert weights["model.lm_head.weight"].data_ptr() == weights["model.token_embedding.weight"].data_ptr()


def test_a_sharded_folder_says_what_to_do_with_it(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gpt-lightning consolidate"):
        load_model(saved["sharded"])
    with pytest.raises(ValueError, match="is no sharded checkpoint"):
        consolidate(saved["one"], tmp_path / "out.ckpt")
    with pytest.raises(ValueError, match="exists already"):
        consolidate(saved["sharded"], saved["one"])


def test_a_strangers_table_of_contents_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "owned",))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    torch.save({}, tmp_path / "rest.pt")
    with pytest.raises(ValueError, match="has no place in a checkpoint"):
        read_whole(tmp_path)
    assert not (tmp_path / "owned").exists()


def largest_gather(run: Run, corpus: Path) -> tuple[int, int, bool]:
    """Elements of the largest tensor that travels, and of the largest full one; whether any travels."""
    module, datamodule = build(corpus, run)
    trainer = trainer_of(run, corpus.parent, Recorder(None))
    trainer.fit(module, datamodule)
    travelled = []
    send, receive = dist.send, dist.recv

    def spy(move: Callable[..., Any]) -> Callable[..., Any]:
        def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            travelled.append(tensor.numel())
            return move(tensor, *args, **kwargs)

        return moved

    full_layout.dist.send, full_layout.dist.recv = spy(send), spy(receive)  # type: ignore[misc]
    try:
        trainer.save_checkpoint(corpus.parent / "spied.ckpt")
    finally:
        full_layout.dist.send, full_layout.dist.recv = send, receive  # type: ignore[misc]
    return max(travelled, default=0), 301 * 36, bool(travelled)


def test_parts_travel_one_by_one_within_the_first_replica(shared_corpus: Path) -> None:
    ranks = run_ranks(largest_gather, 4, Run(2, 2, steps=2), shared_corpus)
    for largest, full, _ in ranks:
        assert largest <= (full + 36) // 2
    assert [any_travelled for _, _, any_travelled in ranks] == [True, True, False, False]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def tear(folder: Path, how: str) -> None:
    part = sorted(folder.glob("*.distcp"))[-1]
    if how == "a part is missing":
        part.unlink()
    elif how == "a part is cut short":
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    elif how == "a bit of a part":
        flip(part)
    elif how == "a bit of the contents":
        flip(folder / ".metadata")
    elif how == "a bit of the rest":
        flip(folder / "rest.pt")
    elif how == "no contents":
        (folder / ".metadata").unlink()
    elif how == "contents cut short":
        (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:300])
    else:
        (folder / "rest.pt").write_bytes((folder / "rest.pt").read_bytes()[:300])


def complaint(run: Run, corpus: Path) -> str:
    module, datamodule = build(corpus, run)
    trainer = trainer_of(run, corpus.parent, Recorder(None))
    with pytest.raises(ValueError) as error:
        trainer.fit(module, datamodule, ckpt_path=run.resume_from, weights_only=True)
    return str(error.value)


TORN = ["a part is missing", "a part is cut short", "no contents", "contents cut short", "rest cut short"]
TORN += ["a bit of a part", "a bit of the contents", "a bit of the rest"]


@pytest.mark.parametrize("how", TORN)
def test_a_torn_folder_is_told_in_one_line(
    how: str, saved: dict[str, Path], shared_corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "torn.ckpt"
    shutil.copytree(saved["sharded"], folder)
    tear(folder, how)
    with pytest.raises(ValueError, match=f"ckpt_path={folder} cannot be read") as error:
        Checkpoint.open(folder).contents
    assert "\n" not in str(error.value)
    for message in run_ranks(complaint, 2, Run(2, 1, steps=8, resume_from=str(folder)), shared_corpus):
        assert message.startswith(f"ckpt_path={folder} cannot be read") and "\n" not in message


def test_what_an_interrupted_save_left_is_not_kept(shared_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.tmp").mkdir()
    (tmp_path / ".last.ckpt.tmp" / "__7_0.distcp").write_bytes(b"of a rank that is no more")
    path = tmp_path / "last.ckpt"
    run_everywhere(Run(2, 1, steps=1, strategy={"save_sharded": True}, save_to=str(path)), shared_corpus)
    assert sorted(file.name for file in path.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    path.rename(tmp_path / ".last.ckpt.old")  # a crash between the two renames of the next save
    assert newest_checkpoint(tmp_path) == path and path.is_dir()


def test_a_file_with_a_flipped_bit_is_refused_whatever_reads_it(
    saved: dict[str, Path], shared_corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "flipped.ckpt"
    write(Checkpoint.open(saved["2x2"]).contents, path)
    flip(path)
    for plugins in (None, lambda: [DurableCheckpointIO()]):
        run = Run(2, 1, steps=8, resume_from=str(path), plugins=plugins)
        for message in run_ranks(complaint, 2, run, shared_corpus):
            assert message.startswith(f"ckpt_path={path} cannot be read") and "checksum" in message


def failing_save(run: Run, corpus: Path, how: str) -> str:
    """In a rank: the second save of a sharded run fails on one of them; what all of them say."""
    module, datamodule = build(corpus, run)
    trainer = trainer_of(run, corpus.parent, Recorder(None))
    trainer.fit(module, datamodule)
    trainer.save_checkpoint(run.save_to)
    if how == "not finite" and trainer.global_rank == 1:
        module.model.blocks[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    elif how == "no room for a part" and trainer.global_rank == 1:
        sharded_layout.dcp.FileSystemWriter.write_data = full_disk
    elif how == "no room for the rest" and trainer.global_rank == 0:
        sharded_layout.write = full_disk
    with pytest.raises((CheckpointWriteError, NonFiniteCheckpointError)) as error:
        trainer.save_checkpoint(run.save_to)
    return str(error.value)


def full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("how", ["not finite", "no room for a part", "no room for the rest"])
def test_a_failed_save_fails_on_all_ranks_and_keeps_the_old_one(
    how: str, shared_corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    strategy = {"save_sharded": True, "replica_check_every_n_steps": 0}
    run = Run(2, 1, steps=1, strategy=strategy, save_to=str(path))
    first, second = run_ranks(failing_save, 2, run, shared_corpus, how)
    assert first == second and "\n" not in first
    expected = "up_proj.weight holds NaN" if how == "not finite" else f"{path} cannot be written (No space"
    assert expected in first
    assert list(tmp_path.iterdir()) == [path]
    Checkpoint.open(path).contents


def test_a_sharded_best_makes_way_for_a_file(saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["sharded"], tmp_path / "last.ckpt")
    shutil.copytree(saved["sharded"], tmp_path / "old.ckpt")
    checkpoint = Checkpoint.open(saved["one"]).contents
    plugin = DurableCheckpointIO()
    options = SaveOptions(True, also=(tmp_path / "last.ckpt",), remove=(tmp_path / "old.ckpt",))
    plugin.save_checkpoint(checkpoint, tmp_path / "best.ckpt", options)
    plugin.teardown()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert (tmp_path / "last.ckpt").read_bytes() == (tmp_path / "best.ckpt").read_bytes()


def save_over(run: Run, corpus: Path, path: Path) -> None:
    """In a rank: a save in the background that waits, before it writes, for the look at what it replaces."""
    looked = threading.Event()

    def waiting(checkpoint: Any, target: Path) -> None:
        assert looked.wait(30)
        write(checkpoint, target)

    checkpoint_io.write = waiting
    trainer = trainer_of(run, corpus.parent, Recorder(None))
    trainer.strategy.setup_environment()
    trainer.strategy.connect(pl.LightningModule())
    trainer.strategy.save_checkpoint({"state_dict": {}}, path, SaveOptions(background=True))
    assert any((folder / "rest.pt").is_file() for folder in (path, path.with_name(f".{path.name}.old")))
    looked.set()
    trainer.strategy.checkpoint_io.teardown()


def test_a_sharded_checkpoint_stays_until_the_file_in_its_place_is_written(
    saved: dict[str, Path], shared_corpus: Path, tmp_path: Path
) -> None:
    """Under its name or, while the file is being written, set aside."""
    path = tmp_path / "last.ckpt"
    shutil.copytree(saved["sharded"], path)
    strategy = {"replica_check_every_n_steps": 0}
    run = Run(strategy=strategy, plugins=lambda: [DurableCheckpointIO()])
    run_ranks(save_over, 1, run, shared_corpus, path)
    assert path.is_file() and list(tmp_path.iterdir()) == [path]


def timeouts(run: Run, corpus: Path) -> list[float]:
    trainer = trainer_of(run, corpus.parent, Recorder(None))
    trainer.strategy.setup_environment()
    mesh = trainer.strategy.mesh
    backends = [group._get_backend(torch.device("cpu")) for group in (mesh.tp_group, mesh.dp_group)]
    return [backend.options._timeout.total_seconds() for backend in backends]


def test_every_group_waits_as_long_as_it_is_told(shared_corpus: Path) -> None:
    run = Run(2, 2, strategy={"timeout": timedelta(seconds=70)})
    assert run_ranks(timeouts, 4, run, shared_corpus) == [[70.0, 70.0]] * 4
