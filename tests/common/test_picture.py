"""Pictures whose titles are in Chinese."""

import pytest

from common import picture
from common.picture import readable

figures = pytest.importorskip("matplotlib.figure")


@pytest.mark.filterwarnings("error")
def test_a_chinese_title_gives_no_warnings(tmp_path):
    """A warning of two lines came for each sign of a run's or a file's name, at every save."""

    @readable()
    def draw():
        figure = figures.Figure()
        figure.suptitle("医疗 ab")
        figure.savefig(tmp_path / "a.png")

    draw()
    draw()  # the decorator is good for more than one picture
    assert (tmp_path / "a.png").exists()


def test_fonts_that_are_installed_follow_matplotlibs_own(monkeypatch):
    from matplotlib import rcParams
    from matplotlib.font_manager import fontManager

    before = rcParams["font.family"]
    some = fontManager.ttflist[-1].name
    monkeypatch.setattr(picture, "FONTS", ("No Such Font", some))
    with readable():
        assert rcParams["font.family"] == ["DejaVu Sans", some]
    assert rcParams["font.family"] == before, "other pictures are as they were"
