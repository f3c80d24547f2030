"""Reports as one HTML file each: nothing is fetched, nothing of what a model said is run.

    write_page("out/xray.html", "xray", "X-ray of full_sft", data)

`evaluation/pages/` has the parts: page.html (the frame), page.css, page.js (what all pages use) and one .js for each
kind of page. The data is JSON in a block that browsers do not run, and scripts put it on the page as text only. The
Content-Security-Policy allows exactly our style and our script, by their hashes (https://www.w3.org/TR/CSP3/).
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path
from typing import Any

from common.console import printable
from common.files import atomic_file

PAGES = Path(__file__).parent / "pages"


def write_page(path: Path | str, kind: str, title: str, data: dict[str, Any]) -> Path:
    """Writes the page and returns its path. kind: the .js in pages/ that shows `data`."""
    with atomic_file(path) as temporary:
        temporary.write_text(render(kind, title, data), encoding="utf-8")
    return Path(path)


def render(kind: str, title: str, data: dict[str, Any]) -> str:
    """The whole page. data: plain values; floats are rounded to 5 digits."""
    style = _part("page.css")
    script = f"'use strict';\n(() => {{\n{_part('page.js')}\n{_part(f'{kind}.js')}\n}})();\n"
    fill = {
        "TITLE": html.escape(printable(title)),
        "STYLE_HASH": _hash(style),
        "SCRIPT_HASH": _hash(script),
        "STYLE": style,
        "DATA": as_json(data),
        "SCRIPT": script,
    }
    frame = _part("page.html")
    pieces = []
    for piece in frame.split("{{"):  # not str.replace: a name in braces inside the data must stay
        name, found, rest = piece.partition("}}")
        pieces.append(fill[name] + rest if found else piece)
    return "".join(pieces)


def as_json(data: Any) -> str:
    """JSON that can stand inside <script>: no `<` is left in it, so that no text can end the block."""
    text = json.dumps(_safe(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _safe(value: Any) -> Any:
    """Control characters become visible, as on a terminal; NaN and infinity, which JSON lacks, become null."""
    if isinstance(value, dict):
        return {printable(str(key)): _safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_safe(item) for item in value]
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < float("inf") else None
    return value


def _part(name: str) -> str:
    return (PAGES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
