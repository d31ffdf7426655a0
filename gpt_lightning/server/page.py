"""Puts the page at `/` together: one answer, which asks for nothing from anywhere but this server."""

from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path

from starlette.responses import Response

_PARTS = Path(__file__).with_name("web")
_LOOKS = Path(__file__).parents[1] / "report" / "base.css"  # which the pages about runs have, too
# Each may use those before it.
_SCRIPTS = ("api.js", "tokens.js", "turn.js", "history.js", "column.js", "page.js")


def page_response() -> Response:
    """Answers with the page, and lets a browser run its script and ask this server, nothing else."""
    html, policy = page()
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(html, media_type="text/html", headers=headers)


@cache
def page() -> tuple[str, str]:
    """Returns the page and its Content-Security-Policy."""
    style = _LOOKS.read_text(encoding="utf-8") + _part("page.css")
    script = "\n".join(map(_part, _SCRIPTS))
    html = _part("page.html").replace("{{ style }}", style).replace("{{ script }}", script)
    rules = {
        "default-src": "'none'",
        "script-src": _hashed(script),
        "style-src": _hashed(style),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",  # no text becomes an element, whatever a script tries
    }
    return html, "; ".join(f"{name} {value}" for name, value in rules.items())


def _part(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")


def _hashed(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
