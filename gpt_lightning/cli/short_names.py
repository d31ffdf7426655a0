"""Takes options of generation by the names that they have in scripts: `--top-p` is `--generation.top_p`."""

from dataclasses import fields

from gpt_lightning.generation.sampling import GenerationConfig

_NAMES = {field.name for field in fields(GenerationConfig)}
_SWITCHES = {field.name for field in fields(GenerationConfig) if field.type is bool}


def in_full(words: list[str]) -> list[str]:
    """Returns the words with the full names of options; a switch that stands alone is on."""
    found = []
    for word, following in zip(words, [*words[1:], "--"]):
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and name in _NAMES:
            if not equals and name in _SWITCHES and following.startswith("--"):
                equals, value = "=", "true"
            word = f"--generation.{name}{equals}{value}"
        found.append(word)
    return found
