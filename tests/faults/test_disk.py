"""Full, limited, read-only and wrong disks; damaged files; two runs in one folder: nothing is lost."""

import os
import signal
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from gpt_lightning.checkpoint.files import verify
from tests.faults.harness import TRAINING, Process, run, weights_hash
from tests.faults.runs import callback, newest_last, write_run
from tests.faults.trace import differences

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def assert_whole(folder: Path) -> None:
    paths = list(folder.glob("checkpoints/*/*.ckpt"))
    assert paths, "no checkpoint is left"
    for path in paths:
        verify(path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path, None, None]:
    """A disk of 2 MiB, which few checkpoints fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_keeps_the_former_checkpoint(small_disk: Path, tmp_path: Path) -> None:
    code, output = run(write_run(tmp_path, "whole"), tmp_path)
    assert code == 0, output
    trainer = {"default_root_dir": str(small_disk), "limit_val_batches": 0}
    checkpoint = {"every_n_train_steps": 3, "monitor": None, "save_top_k": -1}
    words = write_run(tmp_path, "run", trainer=trainer, checkpoint=checkpoint)
    code, output = run(words, tmp_path, log="run.log")
    assert code == 5, output
    last_line = output.splitlines()[-1]
    assert last_line.startswith("error: ") and str(small_disk) in last_line and "Traceback" not in output
    assert "No space left" in last_line and "free" in last_line
    assert_whole(small_disk)
    folder = small_disk / "checkpoints" / "run"
    assert not [path for path in folder.iterdir() if path.name.startswith(".") and path.name != ".lock"]
    for path in folder.glob("step*.ckpt"):
        path.unlink()  # space again
    words = write_run(
        tmp_path, "run", trainer={"default_root_dir": str(small_disk)}, checkpoint={"save_top_k": 0}
    )
    code, output = run(words, tmp_path, log="second.log")
    assert code == 0, output
    assert weights_hash(folder / "last.ckpt") == weights_hash(newest_last(tmp_path, "whole"))


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger"])
def test_curves_that_cannot_be_written_end_the_run_with_its_checkpoint(
    logger: str, small_disk: Path, tmp_path: Path
) -> None:
    code, output = run(write_run(tmp_path, "whole"), tmp_path)
    assert code == 0, output
    class_path = f"lightning.pytorch.loggers.{logger}"
    loggers = {"class_path": class_path, "init_args": {"save_dir": str(small_disk)}}
    filling = [callback("FullDisk", folder=str(small_disk))]
    words = write_run(tmp_path, "run", trainer={"logger": loggers, "callbacks": filling})
    code, output = run(words, tmp_path, log="run.log")
    assert code == 5, output
    last_line = output.splitlines()[-1]
    assert last_line.startswith("error: ") and "No space left" in last_line and "Traceback" not in output
    assert "go on with --ckpt_path checkpoints/run/last.ckpt" in last_line
    (small_disk / "filler").unlink()
    words = write_run(tmp_path, "run", trainer={"logger": loggers})
    code, output = run(words, tmp_path, log="second.log")
    assert code == 0, output
    assert weights_hash(newest_last(tmp_path, "run")) == weights_hash(newest_last(tmp_path, "whole"))
    assert differences(tmp_path / "run", tmp_path / "whole") == []


def test_a_quota_is_told_of_in_the_same_way(tmp_path: Path) -> None:
    words = write_run(tmp_path, "run", trainer={"max_steps": 6})
    assert run(words, tmp_path)[0] == 0
    folder = tmp_path / "checkpoints" / "run"
    before = weights_hash(folder / "last.ckpt")
    limit = [callback("FileSizeLimit", n_bytes=100_000)]
    words = write_run(tmp_path, "run", trainer={"callbacks": limit})
    code, output = run(words, tmp_path, log="second.log")
    assert code == 5 and "last.ckpt" in output.splitlines()[-1] and "File too large" in output
    assert weights_hash(folder / "last.ckpt") == before
    assert not list(folder.glob(".*tmp*"))


def test_a_path_that_cannot_hold_a_run_is_refused_before_training(tmp_path: Path) -> None:
    words = write_run(tmp_path, "run")
    (tmp_path / "checkpoints").write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    code, output = run(words, tmp_path)
    assert code == 2 and "checkpoints" in output.splitlines()[-1] and "Traceback" not in output
    assert not (tmp_path / "run.0").exists()
    left = {path for path in tmp_path.rglob("*") if "cache" not in str(path)}
    assert left == {*before, tmp_path / "log"}


def test_a_read_only_disk_is_refused_before_training(small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    words = write_run(tmp_path, "run", trainer={"default_root_dir": str(small_disk)})
    code, output = run(words, tmp_path)
    assert code == 2 and "Traceback" not in output
    problem = f"{small_disk}/checkpoints cannot be written (Read-only file system)"
    line = f"error: trainer.default_root_dir: {problem}; name another place"
    assert output.splitlines()[-1] == line
    assert not (tmp_path / "run.0").exists()
    words = write_run(tmp_path, "run", data={"cache_dir": str(small_disk)})
    code, output = run(words, tmp_path)
    assert code == 2 and f"error: data.cache_dir={small_disk} cannot be written" in output.splitlines()[-1]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("kind", ["elsewhere", "full"])
def test_the_folder_for_temporary_files_does_not_matter(kind: str, small_disk: Path, tmp_path: Path) -> None:
    if kind == "full":
        with (small_disk / "filler").open("wb") as file:
            while True:
                try:
                    os.write(file.fileno(), b"x" * 4096)
                except OSError:
                    break
    words = write_run(tmp_path, "run", trainer={"max_steps": 6})
    code, output = run(words, tmp_path, TMPDIR=str(small_disk))
    assert code == 0, output
    assert_whole(tmp_path)
    assert [path.name for path in small_disk.iterdir()] == (["filler"] if kind == "full" else [])


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "empty", "one bit flipped"])
def test_last_is_the_newest_file_that_is_whole(how: str, tmp_path: Path) -> None:
    words = write_run(tmp_path, "run", trainer={"max_steps": 12})
    assert run(words, tmp_path)[0] == 0
    last = tmp_path / "checkpoints" / "run" / "last.ckpt"
    damage(last, how)
    code, output = run([*words, "--ckpt_path", str(last)], tmp_path, log="explicit.log")
    assert code == 2 and "last.ckpt" in output.splitlines()[-1] and "Traceback" not in output
    code, output = run([*words, "--trainer.max_steps", "20"], tmp_path, log="second.log")
    assert code == 0, output
    skipped = [line for line in output.splitlines() if "skipped" in line]
    assert len(skipped) == 1 and "last.ckpt" in skipped[0]
    assert "resuming: checkpoints/run/step000010.ckpt" in output
    verify(last)
    damage(last, how)
    # With the configuration that lies beside the checkpoint, too.
    code, output = run(["validate", "--allow_import", "tests"], tmp_path, log="third.log")
    assert code == 0 and sum("skipped" in line for line in output.splitlines()) == 1, output


@pytest.mark.parametrize("save_top_k", [0, 1])
def test_killed_while_saving_on_another_disk_than_tmpdir(save_top_k: int, tmp_path: Path) -> None:
    words = write_run(tmp_path, "whole")
    assert run(words, tmp_path)[0] == 0
    words = write_run(tmp_path, "run", checkpoint={"every_n_train_steps": 1, "save_top_k": save_top_k})
    for number in range(6):  # in its second, third and fourth save
        process = Process(words, tmp_path, log=f"{number}.log", TMPDIR="/dev/shm")
        process.wait_until(lambda: process.phase == TRAINING)
        for _ in range(1 + number % 3):
            process.wait_until(lambda: process.is_writing)
            process.wait_until(lambda: not process.is_writing)
        process.wait_until(lambda: process.is_writing)
        process.send(signal.SIGKILL)
        process.exit_codes()
        assert_whole(tmp_path)
    code, output = run(words, tmp_path, log="last.log")
    assert code == 0, output
    assert not [path for path in (tmp_path / "checkpoints" / "run").iterdir() if "tmp" in path.name]
    assert differences(tmp_path / "run", tmp_path / "whole") == []


def test_two_runs_of_a_name_do_not_meet(tmp_path: Path) -> None:
    words = write_run(tmp_path, "run", trainer={"max_steps": 6})
    fresh = [word for word in words if word not in ("--ckpt_path", "last")]
    both = [Process(fresh, tmp_path, log=f"{number}.log") for number in range(2)]
    assert [process.exit_codes() for process in both] == [[0], [0]]
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["run", "run-2"]
    for folder in folders:
        verify(tmp_path / "checkpoints" / folder / "last.ckpt")


def test_a_run_that_is_going_on_is_not_resumed_by_another(tmp_path: Path) -> None:
    words = write_run(tmp_path, "run", trainer={"max_steps": 100_000})
    process = Process(words, tmp_path)
    last = tmp_path / "checkpoints" / "run" / "last.ckpt"
    assert process.wait_until(last.exists)
    code, output = run(words, tmp_path, log="second.log")
    assert code == 2 and "another process is writing into checkpoints/run" in output.splitlines()[-1]
    process.send(signal.SIGTERM)
    assert process.exit_codes() == [143]
    verify(last)
