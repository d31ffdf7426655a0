"""Two runs never write into one folder, and "last" is the newest checkpoint that is whole."""

import errno
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning.checkpoint.files import write
from gpt_lightning.checkpoint.runs import (
    NUMBERED,
    check_place,
    find_checkpoint,
    named_checkpoint,
    newest_checkpoint,
    newest_of_run,
    open_run_folder,
    run_folder,
)
from gpt_lightning.exit_codes import UserError

fork = multiprocessing.get_context("fork")


def save(path: Path, step: int, age_seconds: int = 0) -> Path:
    write({"global_step": step, "weights": torch.ones(1000)}, path)
    os.utime(path, (1_000_000 - age_seconds,) * 2)
    return path


def flip(path: Path) -> None:
    """A bit of the weights."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def opened_for_a_moment(folder: Path, resumed_from: Path | None, *, begins_again: bool = False) -> Path:
    run = open_run_folder(folder, resumed_from, begins_again=begins_again)
    run.close()
    return run.folder


def opening(pipe: Connection, folder: Path, resumed_from: Path | None) -> None:
    """In a process of its own: open, tell how it went, hold it until told."""
    try:
        run = open_run_folder(folder, resumed_from)
        pipe.send(str(run.folder))
        pipe.recv()
        run.close()
    except ValueError as error:
        pipe.send(str(error))


def in_another_process(function: Callable[..., None], *args: Any) -> tuple[Any, Connection]:
    here, there = fork.Pipe()
    process = fork.Process(target=function, args=(there, *args), daemon=True)
    process.start()
    return process, here


def test_two_runs_that_start_at_once_get_two_folders(tmp_path: Path) -> None:
    started = [in_another_process(opening, tmp_path / "checkpoints" / "run", None) for _ in range(4)]
    folders = {pipe.recv() for _, pipe in started}
    for process, pipe in started:
        pipe.send("end")
        process.join()
    names = ["run", "run-2", "run-3", "run-4"]
    assert sorted(folders) == [str(tmp_path / "checkpoints" / name) for name in names]


def test_a_folder_is_free_again_when_its_process_was_killed(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "last.ckpt", 5)
    process, pipe = in_another_process(opening, tmp_path / "run", path)
    assert pipe.recv() == str(tmp_path / "run")
    with pytest.raises(ValueError, match="another process is writing into .*run; wait for it") as error:
        open_run_folder(tmp_path / "run", path)
    assert "\n" not in str(error.value)
    process.kill()
    process.join()
    run = open_run_folder(tmp_path / "run", path)
    assert run.folder == tmp_path / "run"
    run.close()


def opening_with_a_child(pipe: Connection, folder: Path) -> None:
    run = open_run_folder(folder, None)
    if os.fork() == 0:  # as workers of a DataLoader are made, which outlive a killed run for a while
        pipe.recv()
        os._exit(0)
    pipe.send(str(run.folder))
    time.sleep(60)


def test_a_process_that_outlives_its_killed_parent_does_not_keep_the_folder(tmp_path: Path) -> None:
    process, pipe = in_another_process(opening_with_a_child, tmp_path / "run")
    assert pipe.recv() == str(tmp_path / "run")
    process.kill()
    process.join()
    run = open_run_folder(tmp_path / "run", None)
    assert run.folder == tmp_path / "run"
    run.close()
    pipe.send("end")


def test_a_fresh_run_takes_the_first_free_number(tmp_path: Path) -> None:
    save(tmp_path / "run" / "last.ckpt", 5)
    assert opened_for_a_moment(tmp_path / "run", None) == tmp_path / "run-2"
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-2" / ".lock").touch()  # of a process that was killed before it wrote anything
    assert opened_for_a_moment(tmp_path / "run", None) == tmp_path / "run-2"


def test_an_older_checkpoint_does_not_undo_what_came_after_it(tmp_path: Path) -> None:
    best = save(tmp_path / "run" / "step000004.ckpt", 4)
    last = save(tmp_path / "run" / "last.ckpt", 6)
    assert opened_for_a_moment(tmp_path / "run", last) == tmp_path / "run"
    assert opened_for_a_moment(tmp_path / "run", best) == tmp_path / "run-2"
    flip(last)  # nothing is lost with it
    assert opened_for_a_moment(tmp_path / "run", best) == tmp_path / "run"


def test_leftovers_of_killed_saves_go(tmp_path: Path) -> None:
    last = save(tmp_path / "run" / "last.ckpt", 6)
    (tmp_path / "run" / ".last.ckpt.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / "run" / ".last.ckpt.tmp").mkdir()
    (tmp_path / "run" / ".last.ckpt.tmp" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "run" / "notes.tmp").touch()
    run = open_run_folder(tmp_path / "run", last)
    assert sorted(path.name for path in run.folder.iterdir()) == [".lock", "last.ckpt", "notes.tmp"]
    run.close()
    assert sorted(path.name for path in run.folder.iterdir()) == ["last.ckpt", "notes.tmp"]


def test_what_a_run_did_not_fill_goes_again(tmp_path: Path) -> None:
    run = open_run_folder(tmp_path / "checkpoints" / "run", None)
    assert run.folder.is_dir()
    run.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("blocked", ["checkpoints", "checkpoints/run"])
def test_a_file_in_the_way_is_named(blocked: str, tmp_path: Path) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("not a folder")
    said = rf"trainer.default_root_dir: .*/checkpoints cannot be written \(.*: {tmp_path / blocked}"
    with pytest.raises(UserError, match=said):
        open_run_folder(tmp_path / "checkpoints" / "run", None)
    assert (tmp_path / blocked).read_text() == "not a folder"


def test_last_is_the_newest_that_is_whole(tmp_path: Path) -> None:
    old = save(tmp_path / "run" / "step000002.ckpt", 2, age_seconds=20)
    middle = save(tmp_path / "run-2" / "step000004.ckpt", 4, age_seconds=10)
    newest = save(tmp_path / "run-2" / "last.ckpt", 4)
    (tmp_path / "run-2" / NUMBERED).write_text("run")
    save(tmp_path / "run-3" / "last.ckpt", 4, age_seconds=-60)  # which somebody named so
    save(tmp_path / "run-other" / "last.ckpt", 9)
    lines: list[str] = []
    assert newest_of_run(tmp_path / "run", lines.append) == newest and lines == []
    flip(newest)
    assert newest_of_run(tmp_path / "run", lines.append) == middle
    assert len(lines) == 1 and str(newest) in lines[0] and "\n" not in lines[0]
    middle.write_bytes(middle.read_bytes()[:-5])
    os.utime(middle, (999_990,) * 2)
    lines.clear()
    assert newest_of_run(tmp_path / "run", lines.append) == old
    assert [str(path) in line for path, line in zip((newest, middle), lines, strict=True)] == [True, True]
    assert find_checkpoint(str(newest), tmp_path) == newest  # a name is never another file's


def test_nothing_whole_is_no_fresh_start(tmp_path: Path) -> None:
    assert newest_of_run(tmp_path / "run") is None
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_checkpoint(None, tmp_path / "run")
    for name in ("last.ckpt", "step000002.ckpt"):
        flip(save(tmp_path / "run" / name, 2))
    for find in (newest_of_run, lambda folder: find_checkpoint("last", folder)):
        with pytest.raises(ValueError, match="no checkpoint is whole.*last.ckpt.*nor is another"):
            find(tmp_path / "run")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()
    torn = folder / ".last.ckpt.0123abcd.tmp"
    torn.touch()
    run = open_run_folder(folder, None)
    assert run.folder == tmp_path / "run-2"
    run.close()
    run = open_run_folder(folder, None, begins_again=True)
    assert run.folder == folder and not torn.exists()
    run.close()
    save(folder / "last.ckpt", 3)
    assert opened_for_a_moment(folder, None, begins_again=True) == tmp_path / "run-2"


# ---- the newest


def test_the_newest_is_the_last_written(tmp_path: Path) -> None:
    for number, name in enumerate(("b/last.ckpt", "a/step000010.ckpt", "a/last.ckpt")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({}, tmp_path / name)
        os.utime(tmp_path / name, (number, number))
    assert newest_checkpoint(tmp_path) == tmp_path / "a" / "last.ckpt"
    os.utime(tmp_path / "b" / "last.ckpt", (9, 9))
    assert newest_checkpoint(tmp_path) == tmp_path / "b" / "last.ckpt"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def saved(path: Path, step: int, seconds: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    write({"global_step": step}, path)
    os.utime(path, (seconds, seconds))
    return path


def test_in_a_folder_the_latest_step_is_the_newest(tmp_path: Path) -> None:
    saved(tmp_path / "a" / "best.ckpt", 4, seconds=1)
    last = saved(tmp_path / "a" / "last.ckpt", 6, seconds=2)
    saved(tmp_path / "a" / "copy.ckpt", 4, seconds=9)
    saved(tmp_path / "b" / "last.ckpt", 8, seconds=8)
    assert newest_checkpoint(tmp_path) == last
    last.unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "a" / "copy.ckpt"


@pytest.mark.parametrize("seconds, told", [(1, False), (9, True)])
def test_a_younger_file_without_a_readable_step_is_told_of(seconds: int, told: bool, tmp_path: Path) -> None:
    last = saved(tmp_path / "last.ckpt", 6, seconds=2)
    saved(tmp_path / "torn.ckpt", 8, seconds=0)
    (tmp_path / "torn.ckpt").write_bytes((tmp_path / "torn.ckpt").read_bytes()[:300])
    os.utime(tmp_path / "torn.ckpt", (seconds, seconds))
    lines: list[str] = []
    assert newest_checkpoint(tmp_path, lines.append) == last
    assert ["torn.ckpt" in line for line in lines] == [True] * told


@pytest.mark.parametrize("name", ["run[1]", "run*", "ru?", "[!x]un1", "**"])
def test_a_name_with_the_signs_of_globs_means_itself(name: str, tmp_path: Path) -> None:
    others = [save(tmp_path / other / "last.ckpt", 9) for other in ("run1-2", "run-2", "x-2")]
    for other in others:
        (other.parent / NUMBERED).write_text(name)
    assert newest_of_run(tmp_path / name) is None
    own = save(tmp_path / f"{name}-2" / "last.ckpt", 3, age_seconds=5)
    (own.parent / NUMBERED).write_text(name)
    assert newest_of_run(run_folder(tmp_path, name)) == own


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "/etc", "a\nb", "a\0b", "\x1b[2J", "\udcff", "$HOME", "a::b", "~", "~x"],
)
def test_a_name_that_means_something_else_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^run_name=.*; (leave|give) "):
        run_folder(tmp_path, name)


def test_a_folder_stands_for_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "checkpoints" / "run"
    save(run / "step000002.ckpt", 2, age_seconds=9)
    save(run / "last.ckpt", 4)
    assert named_checkpoint(run) == named_checkpoint(tmp_path) == find_checkpoint(str(run), tmp_path)
    assert named_checkpoint(run) == run / "last.ckpt"
    assert named_checkpoint(run / "step000002.ckpt") == run / "step000002.ckpt"
    flip(run / "last.ckpt")
    warnings: list[str] = []
    assert named_checkpoint(run, warnings.append) == run / "step000002.ckpt" and len(warnings) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is a folder without a whole checkpoint"):
        named_checkpoint(tmp_path / "empty")
    assert named_checkpoint(tmp_path / "missing.ckpt") == tmp_path / "missing.ckpt"


def test_a_run_may_be_named_as_its_folder_and_a_mistyped_one_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path("checkpoints")
    save(root / "novels" / "last.ckpt", 4)
    assert find_checkpoint("novels", root) == root / "novels" / "last.ckpt"
    for given, meant in (
        ("novel", "novels"),
        ("checkpoints/novles", "checkpoints/novels"),
        ("checkpoints/novel/last.ckpt", "checkpoints/novels/last.ckpt"),
    ):
        with pytest.raises(UserError, match=f"^ckpt_path={given} is not a file.*; did you mean {meant}[?]$"):
            find_checkpoint(given, root)
    assert find_checkpoint("none.ckpt", root) == Path("none.ckpt")  # refused where it is opened
    save(tmp_path / "novels", 5)
    assert find_checkpoint("novels", root) == Path("novels")  # what is by just that name


def test_a_rank_that_opens_no_folder_refuses_the_place_in_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints" / "run"
    check_place(folder)
    assert not folder.parent.exists()

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuse)
    said = []
    for open_or_check in (check_place, lambda folder: open_run_folder(folder, None)):
        with pytest.raises(UserError) as refused:
            open_or_check(folder)
        said.append(str(refused.value))
    assert said[0] == said[1]
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder)  # another user's run of this name
    folder.parent.touch()
    check_place(folder)


def test_a_rank_that_opens_no_folder_lets_a_run_go_on_that_the_first_can_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path == folder)  # in a place that others keep
    open_run_folder(folder, None).close()
    folder.mkdir(exist_ok=True)
    check_place(folder)
