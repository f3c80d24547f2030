"""Pictures by matplotlib, with names in Chinese.

@readable()
def draw(path): ...
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# matplotlib's own font has no Chinese. These are what Windows, macOS and Linux bring; each sign is drawn by the first
# that has it.
FONTS = (
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Heiti TC",
    "Arial Unicode MS",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
)


@contextmanager
def readable() -> Iterator[None]:
    """While a figure is made and saved: the fonts above that are installed, and no warning where there is none."""
    from matplotlib import rc_context
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in FONTS if name in installed)]
    with rc_context({"font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield
