"""The processes of a launcher are one run, or none."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_lightning.__main__ import main
from gpt_lightning.cli.ranks import (
    LAUNCHERS,
    check_launcher,
    check_options_under_launcher,
    follow_launcher,
    others_at_work,
    tell_of_no_rank,
)
from tests.distributed import run_ranks

Config = Callable[..., Path]
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0"}
TORCHRUN |= {"GROUP_WORLD_SIZE": "2"}
SRUN = {"SLURM_NTASKS": "6", "SLURM_STEP_NUM_TASKS": "6", "SLURM_NNODES": "3", "SLURM_PROCID": "0"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    others = ("SLURM_NTASKS_PER_NODE", "SLURM_JOB_NAME", "SLURM_ARRAY_TASK_COUNT")
    for name in [*LAUNCHERS, *LAUNCHERS.values(), *TORCHRUN, *SRUN, *others]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "variables, given, followed",
    [
        ({}, ("auto", 1), ("auto", 1)),
        (TORCHRUN, ("auto", 1), (4, 2)),
        (TORCHRUN, (2, 4), (2, 4)),
        ({**TORCHRUN, "WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}, ("auto", 1), ("auto", 1)),
        ({**TORCHRUN, **SRUN}, ("auto", 1), (4, 2)),  # torchrun, started by srun
        (SRUN, ("auto", 1), (2, 3)),
        (SRUN, ("1", 1), ("1", 3)),
        ({**SRUN, "SLURM_JOB_NAME": "bash"}, ("auto", 1), ("auto", 1)),  # where Lightning sees no SLURM
        ({"SLURM_NTASKS": "6", "SLURM_PROCID": "0"}, ("auto", 1), ("auto", 1)),  # a script without srun
    ],
)
def test_a_trainer_has_the_devices_of_its_launcher(
    variables: dict[str, str],
    given: tuple[Any, int],
    followed: tuple[Any, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = {"devices": given[0], "num_nodes": given[1]}
    follow_launcher(settings)
    assert (settings["devices"], settings["num_nodes"]) == followed


@pytest.mark.parametrize("size", LAUNCHERS)
def test_processes_that_would_run_alone_are_refused(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(size, "4")
    check_launcher(2, 1)  # left over from another run: there is no rank
    monkeypatch.setenv(LAUNCHERS[size], "1")
    with pytest.raises(ValueError, match=f"^{size}=4: a launcher .*; leave both out, make their product 4"):
        check_launcher(2, 1)
    monkeypatch.setenv(size, "2")
    check_launcher(2, 1)


def test_one_of_several_that_is_not_told_which_it_is_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for size, rank, is_told in (("2", None, True), ("1", None, False), ("x", None, False), ("2", "0", False)):
        monkeypatch.setenv("WORLD_SIZE", size)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        tell_of_no_rank(1)
        said = capsys.readouterr().err
        assert said.startswith("warning: WORLD_SIZE=2 is set and RANK is not") if is_told else said == ""


@pytest.mark.parametrize("variables, devices", [(TORCHRUN, 4), (TORCHRUN, "auto"), (SRUN, 2), (SRUN, "2")])
def test_nodes_that_are_left_out_leave_nobody_alone(
    variables: dict[str, str], devices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_options_under_launcher(devices, 1)
    for alone in (1, "1"):
        with pytest.raises(ValueError, match="a launcher has started"):
            check_options_under_launcher(alone, 1)


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "x", "RANK": "0", "LOCAL_RANK": "0"}])
def test_what_torchrun_has_left_over_is_refused(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"TORCHELASTIC_RUN_ID": "x"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="^TORCHELASTIC_RUN_ID is set, .*WORLD_SIZE.* no number; start"):
        follow_launcher({"devices": "auto", "num_nodes": 1})


def test_a_rank_that_is_none_of_the_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 2)  # as Lightning reads it from a LOCAL_RANK left over
    check_launcher(1, 3)
    with pytest.raises(ValueError, match="^this process is rank 2 .* of the 2 that trainer.devices=2"):
        check_launcher(2, 1)


@pytest.mark.parametrize(
    "per_node, devices, message",
    [
        ({}, "auto", "You set `--ntasks=2` in your SLURM .* Use `--ntasks-per-node=2` instead"),
        ({"SLURM_NTASKS_PER_NODE": "2"}, "3", "`devices=3` .* `--ntasks-per-node=2` does not match"),
    ],
)
def test_what_srun_is_told_otherwise_is_one_line(
    per_node: dict[str, str],
    devices: str,
    message: str,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    srun = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    for name, value in (srun | per_node).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", str(tiny_config()), "--run_name", "x", "--trainer.devices", devices])
    assert exit.value.code == 2 and not Path("checkpoints/x").exists()
    assert re.search(f"^error: .*{message}", capfd.readouterr().err, re.MULTILINE)


def as_srun(words: list[str]) -> None:
    """A rank in the environment of srun, not in that of torchrun."""
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    counts = {"SLURM_NTASKS": size, "SLURM_NTASKS_PER_NODE": size, "SLURM_STEP_NUM_TASKS": size}
    own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0", "SLURM_JOB_NAME": "fit"}
    os.environ.update({**counts, **own, "SLURM_NNODES": "1"})
    main(words)


@pytest.mark.slow
@pytest.mark.parametrize("launched", [main, as_srun])
def test_two_processes_on_a_cpu_train_one_model(
    launched: Callable[[list[str]], None],
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--config", str(tiny_config()), "--run_name"]
    main([*fit, "one"])
    run_ranks(launched, 2, [*fit, "two", "--data.batch_size", "2"])
    assert {path.name for path in Path("checkpoints").iterdir()} == {"one", "two"}
    losses = []
    for run in ("one", "two"):
        events = EventAccumulator(f"checkpoints/{run}/logs")
        events.Reload()
        losses.append([event.value for event in events.Scalars("train/loss")])
    assert losses[1] == pytest.approx(losses[0], abs=2e-6)
    with pytest.raises(AssertionError, match="SystemExit: 2"):
        run_ranks(launched, 2, [*fit, "alone", "--trainer.devices", "1"])
    assert "a launcher has started 2 processes" in capfd.readouterr().err
    assert not Path("checkpoints/alone").exists()


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, None),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "wait"),
        ({"WORLD_SIZE": "2"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, "wait"),
        ({"SLURM_ARRAY_TASK_COUNT": "1"}, None),
        ({"SLURM_ARRAY_TASK_COUNT": "8"}, "leave"),
    ],
)
def test_processes_that_prepare_text_together(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert others_at_work() == expected
