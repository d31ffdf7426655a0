"""The commands of the README, of the pages that it links and of the help page are those that are run."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.__main__ import main
from gpt_lightning.cli.main import HELP, VERBS, WITHOUT_TRAINER

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))
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
    joined = (PAGES + HELP.partition("{verbs}")[2].partition("The options of")[0]).replace("\\\n", " ")
    return re.findall(r"(?:-m gpt_lightning|gpt-lightning) ([a-z]+[^\n`#&]*)", joined)


def test_the_pages_show_every_verb() -> None:
    assert {command.split()[0] for command in program_commands()} == set(VERBS)


def test_the_readme_is_read_in_five_minutes_and_links_every_page() -> None:
    assert len(README.splitlines()) < 175
    linked = set(re.findall(r"\]\((docs/\w+\.md)", README))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("command", program_commands())
def test_every_command_parses(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    module = "from gpt_lightning import GPTLightningModule\nclass MyModule(GPTLightningModule): ..."
    (tmp_path / "my_package.py").write_text(module, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
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


@pytest.mark.slow
def test_the_notebook_runs_as_it_is_written_and_goes_on(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cells,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "gl.GPT" in block]
    assert len(cells.splitlines()) <= 30
    (tmp_path / "novels").mkdir()
    for number in range(10):
        (tmp_path / "novels" / f"{number}.txt").write_text(corpus.read_text(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "notebook"}
    exec(cells, names)
    assert capsys.readouterr().out.rstrip().splitlines()[-1]
    assert names["trainer"].global_step == 200 and float(names["trainer"].logged_metrics["my/loss"]) < 4
    assert len(names["module"].generate("Once", max_new_tokens=5)) > 4
    assert names["again"].generate("A", max_new_tokens=9) == names["module"].generate("A", max_new_tokens=9)
    longer = cells.replace('"max_steps": 200', '"max_steps": 210')
    exec(longer, names)
    assert names["trainer"].global_step == 210
