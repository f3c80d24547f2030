"""What a command prints -> an SVG that looks like a terminal, so that pages can show real output.

python docs/terminal_shot.py docs/doctor.svg python scripts/check_data.py my.jsonl
"""

import html
import subprocess
import sys
import unicodedata
from pathlib import Path

WIDTH, HEIGHT, PAD = 8.4, 18, 16  # of a character, of a line, around


def columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def draw(command: str, printed: str) -> str:
    lines = [f"$ {command}", *printed.rstrip().splitlines()]
    width, height = max(map(columns, lines)) * WIDTH + 2 * PAD, len(lines) * HEIGHT + 2 * PAD
    rows = [
        f'<text x="{PAD}" y="{PAD + (i + 0.75) * HEIGHT:g}" textLength="{columns(line) * WIDTH:g}"'
        f"{' class=' + chr(34) + 'typed' + chr(34) if not i else ''}>{html.escape(line)}</text>"
        for i, line in enumerate(lines)
        if line.strip()
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}">\n'
        "<style>text { font: 14px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #d8dee9; "
        "white-space: pre } .typed { fill: #a3be8c }</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="#20242c"/>\n' + "\n".join(rows) + "\n</svg>\n"
    )


if __name__ == "__main__":
    target, *command = sys.argv[1:]
    words = [sys.executable if word == "python" else word for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, encoding="utf-8")
    Path(target).write_text(draw(" ".join(command), done.stdout), encoding="utf-8")
