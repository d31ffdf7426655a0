"""The house: which room may stand on which, and no two files in a circle."""

import ast
import sys
from configparser import ConfigParser
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gpt_lightning

PACKAGE = Path(gpt_lightning.__file__).parent
# A room, and the rooms (or the files of one) that it may import; every room may import `exit_codes`.
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": {"checkpoint.atomic"},
    "data": {"checkpoint.atomic"},
    "model": {"kernels"},
    "checkpoint": {"model", "data.tokenizer", "data.chat_template"},
    "parallel": {"kernels", "checkpoint.atomic", "checkpoint.files", "checkpoint.folder"},
    "generation": {"model", "kernels", "checkpoint.atomic"},
    "evaluation": {"model", "generation", "checkpoint"}
    | {"data.tokenizer", "data.charset", "data.documents", "data.hub"},
    "huggingface": {"checkpoint", "model", "data.tokenizer", "data.chat_template", "data.hub"},
    "sweep": {"checkpoint"},
}
for room in ("training", "planning", "callbacks"):  # each may import all rooms before it
    MAY_IMPORT[room] = set(MAY_IMPORT)
MAY_IMPORT["planning"] = {"kernels", "model", "parallel.mesh", "parallel.sharded_replicas"}
MAY_IMPORT["planning"] |= {"training.optim"}
MAY_IMPORT["report"] = {"data", "checkpoint", "generation", "training"}
MAY_IMPORT["server"] = {"model", "checkpoint", "generation", "report"}
MAY_IMPORT["server"] |= {"data.tokenizer", "data.token_names", "data.chat_template"}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
# A file that may import more than its room.
EXCEPTIONS = {"generation.text_stream": {"data.tokenizer"}}
TOP = {"__init__", "__main__", "exit_codes"}
LIGHT = {"kernels": {"torch", "numpy"}}  # the packages of others that a room may import, where that is said


def modules() -> dict[str, Path]:
    """Dotted names below the package, without the rooms' own `__init__` files."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith(".__init__"):
            found[name] = path
    return found


def imports_of(path: Path) -> set[str]:
    """Dotted names of all that the file imports, wherever in it; of ours without the package's name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def our_imports(path: Path) -> set[str]:
    """The modules of ours among them."""
    prefix = "gpt_lightning."
    ours = {name.removeprefix(prefix) for name in imports_of(path) if name.startswith(prefix)}
    return ours & set(modules())


@pytest.mark.parametrize("name", [name for name in modules() if "." in name])
def test_a_room_stands_on_those_that_its_row_allows(name: str) -> None:
    room = name.partition(".")[0]
    allowed = MAY_IMPORT[room] | EXCEPTIONS.get(name, set()) | {room, "exit_codes"}
    across = {
        other
        for other in our_imports(modules()[name])
        if other not in allowed and other.partition(".")[0] not in allowed
    }
    assert not across


@pytest.mark.parametrize("name", [name for name in modules() if name.partition(".")[0] in LIGHT])
def test_a_light_room_imports_no_other_package(name: str) -> None:
    tops = {other.partition(".")[0] for other in imports_of(modules()[name])}
    others = tops - sys.stdlib_module_names - {"gpt_lightning", "typing_extensions"}
    assert others <= LIGHT[name.partition(".")[0]]


def test_no_two_files_import_each_other_in_a_circle() -> None:
    graph = {name: our_imports(path) for name, path in modules().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_file_has_a_room() -> None:
    assert {name.partition(".")[0] for name in modules() if "." in name} == set(MAY_IMPORT)
    assert {name for name in modules() if "." not in name} == TOP


def test_a_room_begins_with_its_charter() -> None:
    for room in MAY_IMPORT:
        tree = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
        charter = ast.get_docstring(tree)
        assert charter and "\n" not in charter and len(charter) <= 110, room
        if room != "checkpoint":  # which lends load_model
            assert len(tree.body) == 1, room


def test_no_public_name_is_missing() -> None:
    for name in gpt_lightning.__all__:
        assert getattr(gpt_lightning, name).__name__ == name


def test_every_file_that_is_no_code_is_in_the_package() -> None:
    """An editable install, as tests have it, would find those that are left out."""
    settings = ConfigParser()
    settings.read(PACKAGE.parent / "setup.cfg", encoding="utf-8")
    data = {
        path
        for room, patterns in settings["options.package_data"].items()
        for pattern in patterns.split(",")
        for path in (PACKAGE / room.removeprefix("gpt_lightning.")).glob(pattern.strip())
    }
    kinds = (".html", ".css", ".js", ".yaml", ".json")
    others = {path for path in PACKAGE.rglob("*.*") if path.suffix in kinds}
    assert others and others <= data
    rooms = {f"gpt_lightning.{room}" for room in MAY_IMPORT}
    assert set(settings["options"]["packages"].split()) == {"gpt_lightning", "gpt_lightning.configs", *rooms}
