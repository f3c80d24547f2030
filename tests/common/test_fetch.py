"""Fetching from a hub: each test is something that hubs, networks or disks really do."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from common import fetch, hubs
from common.console import UserError
from common.fetch import download, in_words
from common.files import ROOT
from common.hubs import SOURCES, RemoteFile, Repository, is_id, list_files
from tests.helpers.hub import COMMIT, Hub, git_hash

BIG = bytes(range(256)) * 5000  # 1.28 MB: more than one block
FILES = {"config.json": b'{"a": 1}\n', "empty.txt": b"", "model.safetensors": BIG, "sub dir/+.json": b"[]"}


@pytest.fixture
def hub(monkeypatch):
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "HF_HUB_OFFLINE", "USE_MODELSCOPE_HUB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetch, "PAUSE", 0)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url + "/")
        hub.add("a/b", FILES)
        hub.add("a/d", {f"part-{i}.jsonl": b"%d" % i for i in range(250)}, "dataset")
        yield hub


def get(folder, id="a/b", kind="model", **options):
    """Lists and fetches everything -> {name: content} of what lies in the folder then."""
    repository = list_files(id, kind, **options)
    download(repository, repository.files, folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("source", SOURCES)
def test_both_hubs_give_the_same_files(hub, source, tmp_path):
    assert get(tmp_path / "m", source=source) == FILES
    (file, *others) = list_files("a/d", "dataset", source=source).files
    assert len(others) == 249, "all pages of a listing"
    download(Repository("a/d", "dataset", source, "", []), [file], tmp_path / "d")
    assert (tmp_path / "d" / "part-0.jsonl").read_bytes() == b"0"
    assert list_files("a/b", "model", source=source).revision == (COMMIT if source == "huggingface" else "master")


def test_the_default_hub_is_a_setting(hub, monkeypatch):
    assert list_files("a/b", "model").source == "huggingface"
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert list_files("a/b", "model").source == "modelscope"


def test_checksums_by_hand(hub):
    """`printf hello | git hash-object --stdin` and `printf hello | sha256sum`."""
    assert git_hash(b"hello") == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"
    listed = {file.name: file.checksum for file in list_files("a/b", "model").files}
    assert listed["empty.txt"] == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", "git's name of an empty file"
    assert len(listed["model.safetensors"]) == 64 and len(listed["config.json"]) == 40


def test_what_is_there_is_not_fetched_again(hub, tmp_path):
    get(tmp_path)
    hub.asked.clear()
    (tmp_path / "config.json").write_bytes(b'{"a": 2}\n')  # the right size, and not what the hub has
    assert get(tmp_path) == FILES and hub.fetched() == ["config.json"]


def test_a_connection_that_breaks_is_made_again_where_it_broke(hub, tmp_path):
    hub.cut["model.safetensors"] = [300_000, 0, 0, 500_000]
    assert get(tmp_path)["model.safetensors"] == BIG
    ranges = [headers.get("Range") for path, headers in hub.asked if path.endswith("model.safetensors")]
    assert ranges == [None, "bytes=300000-", "bytes=300000-", "bytes=300000-", "bytes=800000-"]


def test_a_hub_without_ranges_sends_all_of_it_again(hub, tmp_path):
    hub.ranges, hub.cut["model.safetensors"] = False, [300_000]
    assert get(tmp_path)["model.safetensors"] == BIG


def test_who_is_cut_off_too_often_gives_up_and_goes_on_later(hub, tmp_path):
    hub.cut["model.safetensors"] = [300_000] + 6 * [0]
    with pytest.raises(UserError, match=r"^a/b: cannot be fetched from 127.0.0.1:\d+ .*HF_ENDPOINT"):
        get(tmp_path)
    assert (tmp_path / "model.safetensors.part").stat().st_size == 300_000
    assert not (tmp_path / "model.safetensors").exists(), "half of a file has not the name of the whole"
    hub.asked.clear()
    assert get(tmp_path) == FILES
    assert next(headers["Range"] for path, headers in hub.asked if "safetensors" in path) == "bytes=300000-"


def test_a_killed_download_continues(hub, tmp_path):
    """SIGKILL in the middle: no handler runs, no file is flushed."""
    hub.cut["model.safetensors"] = [len(BIG) // 2] + 40 * [0]
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from common import fetch, hubs; "
        "fetch.PAUSE = 0.05; r = hubs.list_files('a/b', 'model'); fetch.download(r, r.files, Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(ROOT), str(tmp_path)])
    part = tmp_path / "model.safetensors.part"
    for _ in range(1000):
        if part.exists() and part.stat().st_size == len(BIG) // 2:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.stat().st_size == len(BIG) // 2 and not (tmp_path / "model.safetensors").exists()
    hub.cut.clear()
    hub.asked.clear()
    assert get(tmp_path) == FILES
    assert [h.get("Range") for path, h in hub.asked if "safetensors" in path] == [f"bytes={len(BIG) // 2}-"]


def test_what_is_left_of_another_version_is_thrown_away(hub, tmp_path):
    (tmp_path / "model.safetensors.part").write_bytes(b"x" * 1000)
    assert get(tmp_path) == FILES
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.part").write_bytes(b"x" * (len(BIG) + 1000))  # longer than the file is now
    assert get(tmp_path) == FILES


@pytest.mark.parametrize("sent", [BIG[:-1] + b"!", BIG[:1000], BIG + b"and more"], ids=["changed", "short", "long"])
def test_a_wrong_checksum_is_noticed(hub, sent, tmp_path):
    hub.sends["model.safetensors"] = sent
    with pytest.raises(UserError, match="model.safetensors is not the file that it lists"):
        get(tmp_path)
    assert hub.fetched().count("model.safetensors") >= 2, "a second try, from the start"
    assert not list(tmp_path.glob("model*")), "neither the file nor a part that would be continued"


def test_an_overloaded_hub_is_asked_again(hub, tmp_path):
    hub.status["model.safetensors"] = [(503, {}), (429, {})]
    assert get(tmp_path) == FILES


# ---- what is refused


@pytest.mark.parametrize("name", ["../x.json", "/etc/x", "a/../../x", "C:\\x", "..\\x", "\\\\host\\x", "a\nb", "", "."])
def test_names_that_lead_out_of_the_folder(hub, name, tmp_path):
    hub.add("a/b", {name: b"evil"})
    with pytest.raises(UserError, match="would be written outside of its folder; refused"):
        list_files("a/b", "model")
    file = RemoteFile(name, 4, "", f"{hub.url}/x")
    with pytest.raises(UserError, match="refused"):
        download(Repository("a/b", "model", "huggingface", "", []), [file], tmp_path / "in")
    assert not hub.fetched()


def test_links_on_this_disk_that_lead_out_of_the_folder(hub, tmp_path):
    """Left there by whoever unpacked an archive: writing through them would replace a file elsewhere."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    for name in ("config.json", "config.json.part"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).symlink_to(outside)
        with pytest.raises(UserError, match="is a link that leads out of"):
            get(folder)
    assert outside.read_bytes() == b"mine"


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_redirects_to_anything_but_http(hub, to, tmp_path):
    hub.redirects["model.safetensors"] = to
    with pytest.raises(UserError, match="redirects to (file|ftp)://.*, which is not followed"):
        get(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_redirect_from_https_to_http(monkeypatch):
    """Whoever listens on the way could change the file; the rule is in the client, so no https server is needed."""
    import httpx

    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    with hubs.client_of(hubs.place_of("a/b", "model", "huggingface")) as client:
        (check,) = client.event_hooks["request"]
        check(httpx.Request("GET", "https://cdn.example/x"))
        with pytest.raises(UserError, match="redirects to http://cdn.example"):
            check(httpx.Request("GET", "http://cdn.example/x"))


@pytest.mark.parametrize("source, header", [("huggingface", "Authorization"), ("modelscope", "Cookie")])
def test_only_the_hub_learns_the_token(hub, source, header, tmp_path, monkeypatch):
    """Large files come from other hosts, to which the hubs redirect."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    with Hub() as cdn:
        cdn.add("a/b", FILES)
        hub.redirects["model.safetensors"] = f"{cdn.url}/a/b/resolve/{COMMIT}/model.safetensors"
        assert get(tmp_path, source=source) == FILES
        headers = [{name.title() for name in headers} for _, headers in cdn.asked]
        assert headers and all(header not in names for names in headers)
    assert all("secret" in headers[header] for _, headers in hub.asked if "resolve" not in _)


def test_a_circle_of_redirects_ends(hub, tmp_path):
    hub.redirects["model.safetensors"] = f"{hub.url}/a/b/resolve/{COMMIT}/model.safetensors"
    with pytest.raises(UserError, match="cannot be fetched"):
        get(tmp_path)


# ---- what is said


@pytest.mark.parametrize(
    "id, revision, answer, said",
    [
        ("a/nothing", None, None, r"a/nothing: there is nothing of that name on 127.+ if it is private, set HF_TOKEN"),
        ("a/b", "v9", None, "a/b: has no such revision on 127"),
        (
            "a/b",
            None,
            (403, {"X-Error-Code": "GatedRepo"}),
            r"\(403\): accept its conditions at http.+/a/b and set HF_",
        ),
        ("a/b", None, (401, {}), r"does not give it to everybody \(401\)"),
        ("a/b", None, (500, {}), "answers 500 Internal Server Error; try again later"),
        ("a/b", None, (200, {}), "answers, but not with a list of files"),  # the login page of a hotel
    ],
)
def test_one_line_says_what_is_wrong(hub, id, revision, answer, said):
    if answer:
        hub.status["/api/"] = [answer]
    with pytest.raises(UserError, match=said) as error:
        list_files(id, "model", revision=revision)
    assert "\n" not in str(error.value)


def test_modelscope_says_it_too(hub):
    with pytest.raises(UserError, match="nothing of that name .* set MODELSCOPE_API_TOKEN"):
        list_files("a/nothing", "model", source="modelscope")


def test_without_a_network(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match=r"cannot be fetched from 127.0.0.1:9 \(.*refused.*\). Is there a network\?"):
        list_files("a/b", "model")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    for source, other in dict(huggingface="modelscope.cn", modelscope="huggingface.co").items():
        with pytest.raises(UserError, match=f"names a mirror, .* takes {other} instead"):
            list_files("a/b", "model", source=source)
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    with pytest.raises(UserError, match="HF_ENDPOINT=hf-mirror.com: write https://hf-mirror.com"):
        list_files("a/b", "model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="a/b: HF_HUB_OFFLINE forbids to fetch it"):
        list_files("a/b", "model")
    assert not hub.asked


def test_space_is_counted_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors.part").write_bytes(BIG[:280_000])
    usage = fetch.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage._replace(free=1_000_010))
    with pytest.raises(UserError, match=r"needs 1.0 MB in .*, where 1.0 MB are free; make room"):
        get(tmp_path)  # 1,000,011 bytes: what is there already does not count
    assert not hub.fetched()
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage._replace(free=1_000_011))
    assert get(tmp_path) == FILES


def test_a_disk_that_gets_full(hub, tmp_path, monkeypatch):
    """The part stays: the same command continues."""

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def tell(self):
            return self.file.tell()

        def write(self, block):
            if self.file.tell() > 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.file.write(block)

    with monkeypatch.context() as patched:
        opened = lambda path, mode: open(path, mode) if mode == "rb" else Full(open(path, mode))
        patched.setattr(fetch, "open", opened, raising=False)
        with pytest.raises(UserError, match="the disk is full; free some space, then the same command continues"):
            get(tmp_path)
    assert 0 < (tmp_path / "model.safetensors.part").stat().st_size < len(BIG)
    assert get(tmp_path) == FILES


def test_sizes_in_words():
    assert [in_words(size) for size in (0, 999, 34_145_252, 988_097_824, 15_231_000_000)] == [
        "0.0 kB",
        "1.0 kB",
        "34.1 MB",
        "988.1 MB",
        "15.2 GB",
    ]


def test_what_is_a_name_on_a_hub(tmp_path, monkeypatch):
    """A mistyped path must not be looked for in the network, as far as that can be told."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen/Qwen2.5-0.5B", "THUDM/chatglm3-6b", "tatsu-lab/alpaca"):
        assert is_id(name), name
    for name in ("full_sft", "out/full_sft", "models/x", "runs/x", "./x", "../x", "/a/b", "a/b/c", "a/x.pth", "a/", ""):
        assert not is_id(name), name
