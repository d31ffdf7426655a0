"""Tells what a kill leaves in journals of completions, whose they are, and who else may write."""

from pathlib import Path

import pytest

from gpt_lightning.generation.journal import (
    Journal,
    finished_prompts,
    journal_settings,
    lock_output,
    read_journals,
    remove_journals,
)

SETTINGS = journal_settings("digest", ["a", "b"], {"generation.stop": ["é"], "generation.temperature": 0.7})
ROWS = [{"index": index, "completion": f"é\n\u2028{index}"} for index in range(3)]


def keep(output: Path, rank: int, *rows: int) -> Path:
    journal = Journal(output, rank, SETTINGS)
    for row in rows:
        journal.append(ROWS[row])
    (path,) = [path for path in output.parent.iterdir() if path.name.endswith(f"-{rank}")] or [Path()]
    return path


def test_rows_come_back_from_the_journals_of_all_ranks(tmp_path: Path) -> None:
    output = tmp_path / "new" / "a[1].jsonl"
    for rank in (0, 1, 11):
        keep(output, rank, rank % 3)
    keep(output, 3)  # has finished nothing, and leaves nothing
    assert read_journals(output, SETTINGS) == ([ROWS[0], ROWS[1], ROWS[2]], [])
    assert read_journals(output.with_name("a1.jsonl"), SETTINGS) == ([], [])
    (tmp_path / "new" / f".{output.name}.0123abcd.tmp").touch()
    remove_journals(output)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_line_is_left_out_and_written_over(cut: int, tmp_path: Path) -> None:
    output = tmp_path / "p.jsonl"
    path = keep(output, 0, 0, 1)
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_journals(output, SETTINGS) == ([ROWS[0]], [])
    keep(output, 0, 2)
    assert read_journals(output, SETTINGS) == ([ROWS[0], ROWS[2]], [])


def test_a_journal_that_was_torn_at_its_beginning_is_begun_anew(tmp_path: Path) -> None:
    output = tmp_path / "p.jsonl"
    path = keep(output, 0, 0)
    path.write_bytes(path.read_bytes()[:20])
    keep(output, 0, 1)
    assert read_journals(output, SETTINGS) == ([ROWS[1]], [])
    path.write_bytes(b"")
    assert read_journals(output, SETTINGS) == ([], [])


@pytest.mark.parametrize("content", [b"\0\0\0\n", b"[1]\n5\n", b"\xff\n{"])
def test_a_file_that_is_no_journal_is_none(content: bytes, tmp_path: Path) -> None:
    output = tmp_path / "p.jsonl"
    keep(output, 0, 0)
    path = keep(output, 1, 1)
    path.write_bytes(content)
    rows, differences = read_journals(output, SETTINGS)
    assert rows == [ROWS[0]]
    path = keep(output, 1, 1)
    path.write_bytes(path.read_bytes() + content[:3] + b"\n")
    assert read_journals(output, SETTINGS)[0] == ROWS[:2]


def test_what_differs_is_named_and_kept(tmp_path: Path) -> None:
    output = tmp_path / "p.jsonl"
    for rank in range(2):
        keep(output, rank, rank)
    other = journal_settings("another", ["a", "c"], {"generation.stop": [], "generation.temperature": 0.7})
    expected = ["generation.stop was ['é'], is []", "other checkpoint", "other prompts"]
    assert read_journals(output, other) == ([], expected)
    Journal(output, 0, other).append(ROWS[2])
    assert read_journals(output, SETTINGS)[0] == ROWS[:2]
    assert read_journals(output, other)[0] == ROWS[2:]


def test_journals_of_an_output_whose_name_begins_alike_are_left_alone(tmp_path: Path) -> None:
    keep(tmp_path / "out.part-1", 0, 0)
    release = lock_output(tmp_path / "out.part-1")
    before = sorted(tmp_path.iterdir())
    assert read_journals(tmp_path / "out", SETTINGS) == ([], [])
    remove_journals(tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    release()


def test_a_prompt_is_finished_with_all_its_samples() -> None:
    rows = [{"index": index, "sample": sample} for index, sample in [(2, 1), (1, 0), (0, 1), (2, 0), (2, 1)]]
    assert finished_prompts(rows, 2) == {2: [{"index": 2, "sample": 0}, {"index": 2, "sample": 1}]}
    assert list(finished_prompts(ROWS[::-1], 1)) == [0, 1, 2]


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    output = tmp_path / "p.jsonl"
    release = lock_output(output)
    with pytest.raises(ValueError, match=f"output={output}: another process is writing it; wait"):
        lock_output(output)
    lock_output(tmp_path / "other.jsonl")()
    release()
    lock_output(output)()
    assert list(tmp_path.iterdir()) == []
