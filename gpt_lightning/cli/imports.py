"""Which packages a `class_path` may come from: a configuration is data, and brings no code of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

from jsonargparse import set_parsing_settings

from gpt_lightning.exit_codes import UserError

OPTION = "--allow_import"
HELP = "Import class paths from this package too; may be repeated, and stands in no file"
TRUSTED = ("gpt_lightning", "lightning", "lightning_fabric", "pytorch_lightning", "torch", "torchmetrics")


@contextmanager
def limited_imports(words: list[str]) -> Iterator[list[str]]:
    """The command line without `--allow_import`, whose packages may be imported beside the trusted ones.

    It is read from the command line and nowhere else: a file that could allow itself would be no wall. A
    class path that is refused is not imported.
    """
    packages, rest = _split(words)
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*TRUSTED, *packages],
        # A mapping under an option that takes anything stays one, whatever keys it has.
        instantiate_subclass_spec_in_any=False,
    )
    try:
        yield rest
    finally:
        set_parsing_settings(import_path_denylist=packages)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The values of `--allow_import`, and the other words."""
    packages, rest = [], []
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name == OPTION:
            packages.append(_package(value if equals else next(remaining, "")))
        else:
            rest.append(word)
    return [package for package in packages if package not in TRUSTED], rest


def _package(value: str) -> str:
    if not value or not all(part.isidentifier() for part in value.split(".")):
        raise UserError(f"{OPTION}={value} names no package; write e.g. {OPTION} my_package")
    if value.split(".")[0] == "jsonargparse":
        raise UserError(f"{OPTION}={value} would let a file decide what is imported; leave it out")
    return value
