"""/runs: logs are read as they grow, what is sent stays small, nothing outside of the folder is read."""

import json
import os
import time

import httpx
import pytest

from serve import runs as module
from serve.guard import Rules
from serve.runs import POINTS, Runs, Series
from tests.helpers.servers import running


def write(folder, name, rows, summary=None, ago=0.0, **info):
    run = folder / name
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    info |= {"summary": summary} if summary else {}
    (run / "run.json").write_text(json.dumps(info), encoding="utf-8")
    for path in run.iterdir():
        os.utime(path, (time.time() - ago,) * 2)
    return run


def rows(n, every=10, start=0):
    return [
        dict(step=s, loss=8 / s, lr=1e-3, tokens_per_second=5000.0, seconds=2.0 * s)
        for s in range(every + start, n + 1, every)
    ]


def names(overview):
    return [run["name"] for run in overview]


# ---- series


def test_few_values_stay_as_they_are():
    series = Series()
    for step in (10, 20, 35):
        series.add(step, step / 10)
    assert series.points() == [[10, 1.0, 1.0, 1.0], [20, 2.0, 2.0, 2.0], [35, 3.5, 3.5, 3.5]]


def test_many_values_become_means_with_their_extremes():
    """Steps 0 .. 10,239, and a peak at 5,000: it is still seen, and the means are those of all values."""
    series, n = Series(), 10_240
    for step in range(n):
        series.add(step, 1000.0 if step == 5000 else float(step % 2))
    points = series.points()
    assert POINTS <= len(points) <= 2 * POINTS
    (peak,) = [point for point in points if point[3] == 1000.0]
    assert abs(peak[0] - 5000) < series.width and {point[2] for point in points} == {0.0}
    width = series.width
    full = [point for point in points if point is not peak and point[0] < n - width]
    assert {point[1] for point in full} == {0.5}
    assert [point[0] for point in full[:3]] == [(width - 1) / 2 + i * width for i in range(3)]


# ---- logs


def test_a_log_is_read_as_it_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1000)
    write(tmp_path, "a", rows(400))
    runs, found, reads = Runs([tmp_path]), {"more": True}, 0
    while found["more"]:
        found, reads = runs.read("a"), reads + 1
    assert reads == -(-(tmp_path / "a/metrics.jsonl").stat().st_size // 1000) > 2
    assert [point[0] for point in found["series"]["loss"]] == list(range(10, 401, 10))
    log = next(iter(runs.logs.values()))
    with open(log.path, "a", encoding="utf-8") as file:
        file.write('{"step": 410, "loss": 1.5, "val_loss"')  # half a row: the run is writing it
    assert runs.read("a")["series"]["loss"][-1][0] == 400
    with open(log.path, "a", encoding="utf-8") as file:
        file.write(": 2.5}\n")
    found = runs.read("a")["series"]
    assert found["loss"][-1] == [410, 1.5, 1.5, 1.5] and found["val_loss"] == [[410, 2.5, 2.5, 2.5]]


def test_a_continued_run_begins_its_log_anew(tmp_path):
    """It drops the steps that it does again, and puts a new file in the place of the old one."""
    write(tmp_path, "a", rows(400))
    runs = Runs([tmp_path])
    assert len(runs.read("a")["series"]["loss"]) == 40
    (tmp_path / "new").write_text("".join(json.dumps(row) + "\n" for row in rows(200)), encoding="utf-8")
    os.replace(tmp_path / "new", tmp_path / "a/metrics.jsonl")
    assert len(runs.read("a")["series"]["loss"]) == 20


def test_rows_that_are_none_are_passed_over(tmp_path):
    run = write(tmp_path, "a", [])
    bad = [
        "",
        "{",
        "[1]",
        "7",
        '{"loss": 1}',
        '{"step": -1, "loss": 1}',
        '{"step": "1", "loss": 1}',
        '{"step": 1.5, "loss": 1}',
    ]
    bad += [
        '{"step": 2, "loss": null, "lr": "x", "mfu": NaN, "x": Infinity, "y": true, "z": 1e999}',
        "[" * 100_000,
        '{"step": 3, "loss": 1%s}' % ("0" * 400),
    ]
    bad += [
        '{"step": 1%s, "loss": 1}' % ("0" * 30),
        json.dumps({"step": 4, **{f"n{i}": i for i in range(90)}}),
        '{"step": 5, "loss": 2}',
    ]
    (run / "metrics.jsonl").write_bytes("\n".join(bad).encode() + b"\n\xff\xfe\n")
    series = Runs([tmp_path]).read("a")["series"]
    assert len(series) == module.NAMES and "n0" in series and "loss" not in series and "mfu" not in series


def test_a_hundred_megabytes_are_sent_as_a_few_hundred_points(tmp_path):
    """Here 2 MB, and a line of 9: what is sent and kept does not depend on it. A line without an end is not kept."""
    run = write(tmp_path, "a", rows(200_000, every=10))
    with open(run / "metrics.jsonl", "a") as file:
        file.write("x" * (9 << 20))
    runs, found = Runs([tmp_path]), {"more": True}
    while found["more"]:
        found = runs.read("a")
    assert len(json.dumps(found)) < 200_000 and len(found["series"]["loss"]) <= 2 * POINTS
    assert len(runs.logs[run].rest) <= module.CHUNK


# ---- which runs there are


def test_what_is_training_what_is_done_and_what_has_stopped(tmp_path):
    write(tmp_path, "old", rows(100), summary=dict(loss=1), ago=9000, total_steps=100, parameters=25_829_888)
    write(tmp_path, "killed", rows(50), ago=500, total_steps=100)
    write(tmp_path, "now", rows(50), ago=3, total_steps=100)
    slow = [dict(step=1, loss=9, seconds=300.0), dict(step=2, loss=8, seconds=600.0)]
    write(tmp_path, "slow", slow, ago=900)  # logs every 5 minutes: it is still there
    write(tmp_path, "begun", [], ago=20)
    found = Runs([tmp_path, tmp_path, tmp_path / "none"]).overview()
    assert names(found) == ["now", "begun", "killed", "slow", "old"], "the newest first"
    states = {run["name"]: run["state"] for run in found}
    assert states == dict(old="done", killed="stopped", now="training", slow="training", begun="training")
    old = found[-1]
    assert old["total_steps"] == 100 and old["parameters"] == 25_829_888 and old["last"]["step"] == 100
    assert 8990 < old["ago"] < 9100


def test_nothing_outside_of_the_folder_is_read(tmp_path):
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"step": 1, "loss": 1}\n', encoding="utf-8")
    outside = write(tmp_path / "elsewhere", "x", rows(10))
    folder = tmp_path / "runs"
    write(folder, "fine", rows(10))
    (folder / "linked").symlink_to(outside)  # a folder elsewhere
    (folder / "file").mkdir()
    (folder / "file/metrics.jsonl").symlink_to(secret)
    (folder / "file/run.json").write_text("{}", encoding="utf-8")
    (folder / "queue").mkdir()
    os.mkfifo(folder / "queue/metrics.jsonl")  # reading it would never end
    runs = Runs([folder])
    assert sorted(names(runs.overview())) == ["file", "fine"]
    assert runs.read("file")["series"] == {}
    for name in ("..", ".", "", "../elsewhere/x", "linked", "queue", str(outside), "fine/../../elsewhere/x"):
        assert runs.read(name) is None
    with running(runs=runs) as server:
        for name in ("..%2felsewhere%2fx", "%2e%2e", "../../etc/passwd", "linked", "fine%00"):
            assert httpx.get(f"{server.url}/runs/data/{name}").status_code == 404, name


def test_a_server_without_a_model_shows_runs_and_says_what_is_missing(tmp_path):
    write(tmp_path, "a", rows(100), config=dict(learning_rate=0.1))
    with running(runs=Runs([tmp_path])) as server:
        assert names(httpx.get(server.url + "/runs/data").json()["data"]) == ["a"]
        assert httpx.get(server.url + "/runs/data/a").json()["settings"] == {"learning_rate": "0.1"}
        assert httpx.get(server.url + "/v1/models").json()["data"] == []
        answer = httpx.post(server.url + "/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
        assert answer.status_code == 404 and "there were no weights yet" in answer.json()["error"]["message"]
        assert httpx.get(server.url + "/health").status_code == 200


# ---- the page


DRAWN = "document.querySelectorAll('#charts svg').length == 3"
EVIL = "<img src=x onerror=window.hit=1>\u202egpj\x1b[31m"


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "pretrain-2", rows(1000), ago=2, total_steps=2000, config=dict(learning_rate=0.002, seed=1))
    write(
        tmp_path,
        "pretrain-1",
        [*rows(2000), dict(step=2000, val_loss=2.5)],
        summary=dict(loss=1),
        ago=9000,
        total_steps=2000,
        config=dict(learning_rate=0.001, seed=1),
    )
    evil = [dict(step=s, loss=1.0, **{EVIL: 2.0}) for s in range(1, 40)]
    write(tmp_path, EVIL.replace("/", ""), evil, ago=9500, config={EVIL: EVIL})
    return tmp_path


def test_the_page_draws_what_is_training_and_what_is_chosen(browser, folder):
    with running(runs=Runs([folder])) as server:
        browser.open(server.url + "/runs")
        browser.until(DRAWN)
        assert browser.evaluate("[...document.querySelectorAll('#runs input:checked')].map((e) => e.dataset.run)") == [
            "pretrain-2"
        ]
        assert browser.text("#runs tr.training .badge") == "training" and "1,000/2,000" in browser.text("#runs")
        assert "left 0:33:20" in browser.text("#runs"), "1,000 steps of 2 s"
        browser.evaluate("document.querySelector('[data-run=pretrain-1]').click()")
        legend = "[...document.querySelectorAll('#charts figure:first-child .values > span')].map((e) => e.innerText)"
        browser.until(f"{legend}.length == 2")
        assert browser.evaluate(legend)[1].endswith("validation 2.5")
        assert browser.evaluate("document.querySelectorAll('#charts figure:first-child .dot').length") == 1
        browser.evaluate("document.querySelector('#differences').open = true")
        assert (
            browser.text("#differences").split()
            == "Settings that differ pretrain-2 pretrain-1 learning_rate 0.002 0.001".split()
        )
        # the cursor, by keyboard
        browser.evaluate("document.querySelector('#smooth').click(); document.querySelector('#charts svg').focus()")
        browser.until("!document.querySelector('.faint')")
        browser.evaluate("document.querySelector('#charts svg').focus()")
        browser.press("ArrowLeft")
        assert "step 1,960" in browser.text("#charts figure:first-child figcaption")
        # what the run logs next appears by itself
        with open(folder / "pretrain-2/metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(step=1010, loss=0.123, seconds=2020)) + "\n")
        browser.until(f"{legend}[0].endsWith(' 0.123')")
        assert all(url.startswith(server.url) for url in browser.requests) and not browser.errors


def test_names_are_text(browser, folder):
    with running(runs=Runs([folder])) as server:
        browser.open(server.url + "/runs")
        browser.until(DRAWN)
        browser.evaluate(
            "document.querySelectorAll('#runs input')[2].click(); document.querySelector('#more').open = true"
        )
        browser.until("document.querySelectorAll('#others svg').length == 1")
        browser.evaluate("document.querySelector('#differences').open = true")
        for place in ("#runs", "#others figcaption", "#differences", "#charts figcaption"):
            assert r"<img src=x onerror=window.hit=1>\u202egpj\u001b[31m" in browser.text(place), place
        assert browser.evaluate("window.hit ?? null") is None and not browser.evaluate("document.images.length")
        assert all(url.startswith(server.url) for url in browser.requests) and not browser.errors


def test_a_key_is_asked_for(browser, folder):
    with running(runs=Runs([folder]), rules=Rules(key="secret")) as server:
        for path in ("/runs/data", "/runs/data/pretrain-1"):
            assert httpx.get(server.url + path).status_code == 401
        browser.open(server.url + "/runs")
        browser.evaluate("sessionStorage.clear()")
        browser.until("document.querySelector('#settings').open && !document.querySelector('#key_row').hidden")
        browser.evaluate("document.querySelector('#api_key').value = 'secret'")
        browser.evaluate("document.querySelector('dialog button').click()")
        browser.until(DRAWN)


@pytest.mark.parametrize("language, width, badge", [("zh-CN", 390, "训练中"), ("en-US", 1200, "training")])
def test_languages_and_widths(browser, folder, language, width, badge):
    with running(runs=Runs([folder])) as server:
        browser.open(server.url + "/runs", width=width, language=language, dark=width > 400)
        browser.until(DRAWN)
        assert browser.text("#runs tr.training .badge") == badge
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
