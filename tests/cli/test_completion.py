"""A real bash completes verbs, options, their words and files by the script that the program prints."""

import builtins
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.__main__ import main
from gpt_lightning.cli.main import VERBS

# As bash itself calls the function: the program, the word to complete and the one before.
COMPLETE = """
source "$1"; shift
complete -p gpt-lightning
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
_shtab_gpt_lightning "$1" "${@: -1}" "${@: -2:1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(script: Path, *words: str) -> list[str]:
    command = ["bash", "--norc", "-c", COMPLETE, "bash", str(script), "gpt-lightning", *words]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, check=True)
    registered, *found = done.stdout.splitlines()
    assert registered == "complete -o bashdefault -F _shtab_gpt_lightning gpt-lightning" and not done.stderr
    return found


@pytest.mark.slow
def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    main(["--print_shtab", "bash"])
    script = tmp_path / "script.bash"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "mine.yaml").touch()
    assert {*VERBS} <= {*completed(script, "")}
    assert completed(script, "pred") == ["predict"]
    assert completed(script, "fit", "--model.config.n_l") == ["--model.config.n_layers"]
    assert completed(script, "fit", "--trainer.max_s") == ["--trainer.max_steps"]
    assert "bf16-mixed" in completed(script, "fit", "--trainer.precision", "bf16")
    assert completed(script, "fit", "--config", "mi") == ["mine.yaml"]
    assert completed(script, "generate", "--generation.min") == ["--generation.min_p"]
    assert completed(script, "consolidate", "--ck") == ["--ckpt_path"]
    assert completed(script, "generate", "--trainer.max_s") == [""]


@pytest.mark.parametrize("words", [["--print_shtab"], ["--print_shtab=fish"], ["--print_shtab", "a", "b"]])
def test_other_shells_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(words)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.startswith("error: --print_shtab needs the name of a shell; ")


def test_without_shtab_its_line_for_pip_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "shtab":
            raise ImportError
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit) as exit:
        main(["--print_shtab", "bash"])
    message = capsys.readouterr().err
    assert exit.value.code == 2 and "pip install 'gpt_lightning[completion]'" in message
