"""Refuses a built site that loads anything from elsewhere: fonts, scripts, styles, images.

python deploy/check_site.py FOLDER

Ends with 0 when every page and style sheet loads only files that are in the folder, else with 1 and one
line per file that is not. Links that a reader may follow are not loaded and may go anywhere.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FOLLOWED = {"canonical", "prev", "next", "edit", "alternate"}
"""Relations of a `<link>` that a browser does not load."""


class Resources(HTMLParser):
    """Collects the addresses that a browser loads by itself when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.found += [values[name] or "" for name in ("src", "poster") if name in values]
        if tag == "link" and not FOLLOWED & set((values.get("rel") or "").split()):
            self.found.append(values.get("href") or "")
        self.found += [part.split()[0] for part in (values.get("srcset") or "").split(",") if part]


def loaded(path: Path) -> list[str]:
    """Return the addresses that the page or style sheet at `path` loads."""
    text = path.read_text(encoding="utf-8")
    styles = text
    found = []
    if path.suffix == ".html":
        parser = Resources()
        parser.feed(text)
        found = parser.found
        styles = "".join(re.findall(r"<style.*?</style>", text, re.S))
    styles = re.sub(r"/\*.*?\*/", "", styles, flags=re.S)
    found += re.findall(r"url\(\s*[\"']?([^\"')]+)", styles)
    found += re.findall(r"@import\s+[\"']([^\"']+)", styles)
    return [address for address in found if not address.startswith(("data:", "#"))]


def faults(folder: Path) -> Iterator[str]:
    """Yield one line per file that a page loads and that is not in `folder`."""
    pages = [path for path in sorted(folder.rglob("*")) if path.suffix in {".html", ".css"}]
    if not pages:
        yield f"{folder}: no page"
    for page in pages:
        for address in loaded(page):
            parts = urlsplit(address)
            base = folder if parts.path.startswith("/") else page.parent
            target = base / unquote(parts.path).lstrip("/")
            if parts.scheme or parts.netloc:
                yield f"{page.relative_to(folder)}: {address} is loaded from elsewhere"
            elif not target.is_file():
                yield f"{page.relative_to(folder)}: {address} does not exist"


def main(arguments: Sequence[str]) -> int:
    found = list(faults(Path(arguments[0])))
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
