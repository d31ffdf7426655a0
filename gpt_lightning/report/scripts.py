"""Keeps the script that draws charts in a browser, which takes seconds to put together."""

from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from gpt_lightning.checkpoint.atomic import user_cache, written_file


def chart_script() -> str:
    """Returns Vega with all that it needs, as one script that makes `vegaEmbed` known."""
    with suppress(OSError, UnicodeDecodeError):
        return _path().read_text(encoding="utf-8")
    import vl_convert  # slow to import

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vega_lite_version())
    with suppress(OSError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_file(path) as file:
            file.write(script.encode())
    return script


def _path() -> Path:
    return user_cache() / f"vega-{version('altair')}-{version('vl-convert-python')}.js"


def vega_lite_version() -> str:
    """Returns that for which Altair writes, as vl-convert names it: v6_1."""
    import altair  # slow to import

    return "_".join(altair.SCHEMA_VERSION.split(".")[:2])
