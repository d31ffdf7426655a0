"""The command line before Lightning sees it: which configuration file a verb runs with."""

from pathlib import Path

from gpt_lightning.run_folder import CONFIG_NAME, checkpoints_folder, find_checkpoint


def complete_words(words: list[str]) -> list[str]:
    """The command line with the configuration file filled in that it leaves to us.

    `fit` and `prepare` alone run the quickstart; a verb on a checkpoint runs with the configuration that was
    saved beside it.
    """
    if _value(words, "--config", "-c") is not None:
        return words
    verb, rest = words[0], words[1:]
    given = _value(words, "--ckpt_path")
    if verb in ("fit", "prepare") and given in (None, "last"):
        return [verb, "--config", str(_default_config()), *rest]
    if verb == "predict" or "--help" in rest or "-h" in rest:
        return words
    path = find_checkpoint(given, checkpoints_folder(_value(words, "--trainer.default_root_dir")))
    if not path.is_file():
        return words
    config = path.parent / CONFIG_NAME
    if not config.is_file():
        raise ValueError(f"ckpt_path={path} has no {CONFIG_NAME} beside it; give --config FILE")
    return [verb, "--config", str(config), *rest]


def _value(words: list[str], *names: str) -> str | None:
    """The value of an option on the command line, as `--name value` or `--name=value`."""
    for word, following in zip(words, [*words[1:], ""]):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else following
    return None


def _default_config() -> Path:
    """quickstart.yaml: inside the package where it is installed, beside it in a clone."""
    package = Path(__file__).parent
    candidates = (package / "configs" / "quickstart.yaml", package.parent / "configs" / "quickstart.yaml")
    return next(path for path in candidates if path.is_file())
