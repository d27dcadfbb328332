"""The dashboard: one page and the files that it loads, served by the admin port as they lie here.

ES modules and a style sheet, no build step, nothing from another origin. The page polls /fleet
each second. With admin keys it asks for one and keeps it in the tab's sessionStorage, from which
no other origin and no other tab reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_TYPES: Final = {
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".svg": b"image/svg+xml",
}
_PAGE: Final = "index.html"

#: Only files of this origin run, style and answer; nobody frames the page. Names of models come
#: from replicas: even if one got into the page as markup, it could do nothing.
_POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    b"require-trusted-types-for 'script'"
)
PAGE_HEADERS: Final = (
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)


def load_files() -> dict[str, tuple[bytes, bytes]]:
    """Path on the admin port -> type and content; the page itself is at "/"."""
    files = sorted(file for file in Path(__file__).parent.iterdir() if file.suffix in _TYPES)
    return {
        "/" if file.name == _PAGE else f"/dashboard/{file.name}": (
            _TYPES[file.suffix],
            file.read_bytes(),
        )
        for file in files
    }
