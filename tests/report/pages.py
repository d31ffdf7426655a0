"""What a browser would make of a page: its elements, and the text that is seen."""

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Collects the elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)
        if tag in ("td", "th"):
            self.text += " "
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
        elif "style" not in self._open:
            self.text += data

    def fetches(self) -> list[str]:
        """Names what the page's elements would load."""
        names = ("src", "href", "srcset", "data", "poster", "action")
        given = (attributes.get(name) for _, attributes in self.elements for name in names)
        return [address for address in given if address is not None and not address.startswith("#")]

    def handlers(self) -> list[str]:
        return [name for _, attributes in self.elements for name in attributes if name.startswith("on")]
