"""The README's commands are those that are run."""

import re
import shlex
from pathlib import Path

import pytest

from gpt_lightning.__main__ import main
from gpt_lightning.cli.main import VERBS, WITHOUT_TRAINER

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


def test_continuous_integration_runs_the_test_command_to_the_letter() -> None:
    (command,) = [block.strip() for block in COMMANDS if "pytest" in block and "slow" in block]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_continuous_integration_installs_what_the_readme_installs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    first = COMMANDS[0]
    assert "python3 -m venv .venv" in first and "python3 -m venv .venv" in script
    assert "--constraint constraints.txt --editable '.[dev]'" in first
    # And what an export is proved with.
    assert "--constraint constraints.txt --editable '.[dev,ecosystem]'" in script


def program_commands() -> list[str]:
    joined = README.replace("\\\n", " ")
    return re.findall(r"(?:python -m gpt_lightning|gpt-lightning) ([a-z]+[^\n`#&]*)", joined)


def test_the_readme_shows_every_verb() -> None:
    assert {command.split()[0] for command in program_commands()} == set(VERBS)


@pytest.mark.parametrize("command", program_commands())
def test_every_command_parses(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    # What the reader puts in or has made by an earlier line.
    stand_ins = {"FILE": "configs/quickstart.yaml", "mine.yaml": "configs/quickstart.yaml"}
    words = [stand_ins.get(word, word) for word in shlex.split(command.split(">")[0])]
    if words[0] != "prepare" and "--ckpt_path" not in words and words[0] in ("validate", "test", "predict"):
        words += ["--config", "configs/quickstart.yaml"]
    # Either parses all that stands before it.
    last = "--help" if words[0] in WITHOUT_TRAINER else "--print_config"
    with pytest.raises(SystemExit) as exit:
        main([*words, last])
    assert exit.value.code == 0, capsys.readouterr().err
