"""The pages: the files in serve/page, as they are. Nothing is built, and nothing is fetched from elsewhere.

The Content-Security-Policy lets the browser run our own scripts only, and ask this server only. With Trusted Types a
script cannot turn text into HTML either: what a model said stays text (https://www.w3.org/TR/trusted-types/).
"""

from __future__ import annotations

from pathlib import Path

from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HTML = {"/": "index.html", "/compare": "compare.html", "/runs": "runs.html"}
SCRIPTS = "answers api app chart compare conversations markdown runs settings votes words".split()
NAMES = ("style.css", "icon.svg", *(f"{name}.js" for name in SCRIPTS))
PAGES = HTML | {f"/page/{name}": name for name in NAMES}  # path -> file

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def page(path: str) -> Response:
    """The file that belongs to a path of PAGES."""
    file = FOLDER / PAGES[path]
    return Response(file.read_bytes(), media_type=TYPES[file.suffix], headers=HEADERS)
