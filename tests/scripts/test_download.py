"""scripts/download.py and names of a hub in place of paths, against a hub on this machine."""

import gzip
import json
import threading
from types import SimpleNamespace

import pytest

from common import fetch
from common.console import UserError
from common.files import ROOT
from dataset.read import hub as data
from model import hub as models
from model.checkpoint import find_weights
from tests.helpers.hub import COMMIT, Hub
from tests.helpers.runs import run_script, run_stage

WEIGHTS = b"weights" * 1000
TEXTS = {"config.json": b"{}", "tokenizer.json": b"{}", "merges.txt": b"a b", "chat_template.jinja": b"x"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub, and a clone whose models/ and dataset/ are empty, too."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "USE_MODELSCOPE_HUB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetch, "PAUSE", 0)
    monkeypatch.setattr(models, "MODELS", tmp_path / "models")
    monkeypatch.setattr(data, "FOLDER", tmp_path / "dataset")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        yield hub


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != models.ABOUT)


# ---- models


def test_of_a_model_only_what_is_needed_is_fetched(hub, tmp_path):
    """Qwen's and Mistral's directories: the same weights two and three times, and code."""
    useless = ("modeling_x.py", "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors")
    useless += ("onnx/model.onnx", "x.gguf", "README.md", "original/params.json", ".gitattributes")
    hub.add("a/tiny", TEXTS | {"model.safetensors": WEIGHTS} | dict.fromkeys(useless, b"x"))
    status, out, err = run_script("scripts/download.py", "a/tiny")
    folder = tmp_path / "models/tiny"
    assert status == 0 and f"--weight {folder}" in out
    assert f"a/tiny: fetching 5 files, 7.0 kB, from {hub.url[7:]} to {folder}" in err
    assert names(folder) == sorted([*TEXTS, "model.safetensors"])
    assert json.loads((folder / models.ABOUT).read_text())["sources"][0]["commit"] == COMMIT
    assert names(tmp_path / "models") == ["tiny"], "no lock and no half folder is left"

    hub.asked.clear()
    assert run_script("scripts/download.py", "a/tiny")[0] == 0 and not hub.asked, "it is there"


def test_pickles_are_fetched_where_there_is_nothing_else(hub, tmp_path):
    hub.add(
        "a/old", {"config.json": b"{}", "pytorch_model.bin": WEIGHTS, "optimizer.pt": b"x", "training_args.bin": b"x"}
    )
    assert names(models.fetch_model("a/old")) == ["config.json", "pytorch_model.bin"]
    hub.add("a/gguf", {"x-q8_0.gguf": WEIGHTS})
    with pytest.raises(UserError, match="a/gguf: has no weights that can be read .*, only x-q8_0.gguf"):
        models.fetch_model("a/gguf")
    assert run_script("scripts/download.py", "a/gguf", "--include", "*.gguf")[0] == 0, "asked for by name"
    assert names(tmp_path / "models/gguf") == ["x-q8_0.gguf"]


def test_a_folder_has_its_name_only_when_it_is_whole(hub, tmp_path):
    hub.add("a/tiny", TEXTS | {"model.safetensors": WEIGHTS})
    hub.cut["model.safetensors"] = [100] + 9 * [0]
    assert run_script("scripts/download.py", "a/tiny")[0] == 2
    assert not (tmp_path / "models/tiny").exists()
    (tmp_path / "models/.tiny.partial/of_another_revision.json").write_bytes(b"{}")
    hub.cut.clear()
    hub.asked.clear()
    assert run_script("scripts/download.py", "a/tiny")[0] == 0
    assert hub.fetched() == ["model.safetensors"], "the others were there"
    assert names(tmp_path / "models/tiny") == sorted([*TEXTS, "model.safetensors"])


def test_no_folder_is_left_where_there_is_no_room(hub, tmp_path, monkeypatch):
    hub.add("a/tiny", TEXTS | {"model.safetensors": WEIGHTS})
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    status, _, err = run_script("scripts/download.py", "a/tiny")
    assert status == 2 and "make room" in err
    assert not any(path.is_dir() for path in (tmp_path / "models").iterdir())


def test_another_model_of_the_same_name_is_no_copy(hub, tmp_path):
    for owner in "ab":
        hub.add(f"{owner}/tiny", {"config.json": owner.encode(), "model.safetensors": WEIGHTS})
    models.fetch_model("a/tiny")
    with pytest.raises(UserError, match="b/tiny: .* is there already, a copy of a/tiny; remove it, or choose"):
        find_weights("b/tiny")
    with pytest.raises(UserError, match="a copy of a/tiny; remove it"):
        models.fetch_model("a/tiny", revision="v1")
    assert models.fetch_model("b/tiny", to=tmp_path / "mine").joinpath("config.json").read_bytes() == b"b"
    assert models.fetch_model("a/tiny", revision="v1", to=tmp_path / "v1") == tmp_path / "v1/tiny"
    with pytest.raises(UserError, match="a copy of a/tiny, revision v1"):
        models.fetch_model("a/tiny", revision="main", to=tmp_path / "v1")
    with pytest.raises(UserError, match="a copy of a/tiny; remove it"):
        models.fetch_model("a/tiny", patterns=["*.gguf"])
    for name in ("a/..", "a/b/c", "../b"):
        with pytest.raises(UserError, match="no name on a hub"):
            models.fetch_model(name)


def test_minimind_comes_with_its_tokenizer(hub, tmp_path):
    """Its folder of weights has none: MiniMind keeps it with the code."""
    weights = {f"{name}.pth": WEIGHTS for name in ("full_sft_512", "pretrain_512", "full_sft_768", "full_sft_640_moe")}
    hub.add("gongjy/MiniMind2-PyTorch", weights)
    hub.add("gongjy/MiniMind2-Small", {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "x.safetensors": b""})
    status, out, err = run_script("scripts/download.py", "MiniMind2-PyTorch", "--source", "modelscope")
    folder = tmp_path / "models/MiniMind2-PyTorch"
    assert status == 0 and f"--weight {folder / 'full_sft_512.pth'}" in out, err
    assert names(folder) == ["full_sft_512.pth", "pretrain_512.pth", "tokenizer.json", "tokenizer_config.json"]


def test_a_copy_in_hugging_faces_cache_is_used(hub, tmp_path):
    """transformers has fetched it before: refs/main names the snapshot, whose files are links."""
    cache = tmp_path / "cache/hub/models--a--tiny"
    for commit, files in {"new": {"model.safetensors"}, "old": {"model.safetensors"}, "half": set()}.items():
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "blobs").mkdir(exist_ok=True)
        for name in {"config.json"} | files:
            (cache / "blobs" / f"{commit}-{name}").write_bytes(b"{}")
            (cache / "snapshots" / commit / name).symlink_to(cache / "blobs" / f"{commit}-{name}")
    (cache / "refs").mkdir()
    for main in ("new", "old"):
        (cache / "refs/main").write_text(main)
        assert find_weights("a/tiny") == cache / "snapshots" / main
    (cache / "refs/main").write_text("half")  # only its config.json was asked for
    assert find_weights("a/tiny").name in ("new", "old")
    assert not hub.asked


def test_a_note_that_is_something_else_counts_as_none(hub, tmp_path):
    hub.add("a/tiny", TEXTS | {"model.safetensors": WEIGHTS})
    folder = models.find_model("a/tiny")
    (folder / models.ABOUT).write_text("[]")
    hub.asked.clear()
    assert models.find_model("a/tiny") == folder and not hub.asked, "it is whole all the same"


def test_a_copy_that_lacks_a_shard_is_no_copy(hub, tmp_path):
    folder = tmp_path / "models/tiny"
    folder.mkdir(parents=True)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "model-1.safetensors"):
        (folder / name).write_bytes(b"{}")
    assert not models._is_whole(folder)
    (folder / "model-2.safetensors").write_bytes(b"{}")
    assert find_weights("a/tiny") == folder and not hub.asked, "put there by hand"


def test_processes_of_one_training_fetch_once(hub):
    """Each process of torchrun looks for the weights; the first one fetches them, the others wait."""
    hub.add("a/tiny", TEXTS | {"model.safetensors": WEIGHTS})
    found = []
    threads = [threading.Thread(target=lambda: found.append(find_weights("a/tiny"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4
    assert sorted(hub.fetched()) == sorted([*TEXTS, "model.safetensors"])


def test_a_mistyped_name_says_both_things_that_it_may_be(hub, monkeypatch):
    with pytest.raises(UserError, match=r"^Qwen/Qwen9: no such file or directory; as a model on a hub: there is noth"):
        find_weights("Qwen/Qwen9")
    assert not models.MODELS.exists(), "nothing is left of the attempt"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.asked.clear()
    for script, flag in (("eval_model.py", "--weight"), ("trainer/train_full_sft.py", "--model_name_or_path")):
        status, _, err = run_script(script, flag, "Qwen/Qwen2-0.5B", "--device=cpu")
        (line,) = err.strip().splitlines()
        assert status == 2 and line.endswith("as a model on a hub: HF_HUB_OFFLINE forbids to fetch it")
    assert not hub.asked


# ---- data sets


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_miniminds_files_come_one_by_one(hub, tmp_path):
    """Of a repository of 26 GB, the one file that was asked for, where the trainings look for it."""
    files = {f"{name}.jsonl": name.encode() for name in data.MINIMIND_FILES}
    for id in data.MINIMIND.values():
        hub.add(id, files, "dataset")
    assert run_script("scripts/download.py", "pretrain_hq", "dpo")[0] == 0
    assert run_script("scripts/download.py", "sft_mini_512", "--source", "modelscope")[0] == 0
    assert names(tmp_path / "dataset") == ["dpo.jsonl", "pretrain_hq.jsonl", "sft_mini_512.jsonl"]
    assert (tmp_path / "dataset/dpo.jsonl").read_bytes() == b"dpo" and len(hub.fetched()) == 3


def test_the_five_data_sets_of_the_pc_project(hub, tmp_path):
    """In the files that the hub has: a JSON array as it is, a gzip file and a Parquet file as lines of JSON."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    alpaca = [{"instruction": "你好", "input": "", "output": "嗨"}, {"instruction": "b", "input": "", "output": "c"}]
    array = json.dumps(alpaca, ensure_ascii=False).encode()
    tree = {"message_tree_id": "1", "prompt": {"role": "prompter", "text": "hi", "replies": []}}
    parquet.write_table(pyarrow.Table.from_pylist(alpaca), tmp_path / "x.parquet")
    hub.add("hfl/alpaca_zh_51k", {"README.md": b"", "alpaca_data_51k.json": array}, "dataset")
    hub.add("llamafactory/alpaca_gpt4_en", {"alpaca_gpt4_data_en.json": array}, "dataset")
    oasst = {"2023-04-12_oasst_ready.trees.jsonl.gz": gzip.compress(json.dumps(tree).encode() + b"\n")}
    hub.add("OpenAssistant/oasst1", oasst | {"2023-04-12_oasst_all.trees.jsonl.gz": b"x"}, "dataset")
    table = (tmp_path / "x.parquet").read_bytes()
    hub.add("tatsu-lab/alpaca", {"data/train-00000-of-00001-a09b.parquet": table}, "dataset")
    hub.add("yahma/alpaca-cleaned", {"alpaca_data_cleaned.json": array}, "dataset")

    asked = ("chinese_alpaca", "alpaca_gpt4_data", "OpenAssistant/oasst1", "tatsu-lab/alpaca", "yahma/alpaca-cleaned")
    status, _, err = run_script("scripts/download.py", *asked)
    assert status == 0, err
    folder = tmp_path / "dataset"
    expected = ["alpaca-cleaned.json", "alpaca.jsonl", "alpaca_gpt4_data.json", "chinese_alpaca.json", "oasst1.jsonl"]
    assert names(folder) == expected
    assert rows_of(folder / "alpaca.jsonl") == alpaca and rows_of(folder / "oasst1.jsonl") == [tree]
    assert (folder / "chinese_alpaca.json").read_bytes() == array


def test_any_data_set_by_its_name(hub, tmp_path):
    """One format, the split called train, all its files in order; --include chooses others."""
    files = {f"zh/{split}-{i}.jsonl": b'{"text": "%d"}\n' % i for split in ("train", "test") for i in (1, 0)}
    hub.add("a/rows", files | {"dataset_infos.json": b"{}", "zh/train.parquet": b""}, "dataset")
    assert run_script("scripts/download.py", "a/rows", "--repo_type=dataset")[0] == 0
    assert rows_of(tmp_path / "dataset/a--rows.jsonl") == [{"text": "1"}, {"text": "0"}]
    words = ["a/rows", "--repo_type=dataset", "--include=zh/test-1.jsonl", f"--to={tmp_path}"]
    assert run_script("scripts/download.py", *words)[0] == 0
    assert (tmp_path / "a--rows.jsonl").read_bytes() == b'{"text": "1"}\n'
    hub.add("a/images", {"x.png": b""}, "dataset")
    with pytest.raises(UserError, match=r"a/images: has no file called \*.jsonl .*; there is x.png"):
        data.fetch_data("a/images")


def test_a_file_that_cannot_be_unpacked_leaves_nothing_behind(hub, tmp_path):
    hub.add("a/rows", {"train.jsonl.gz": b"no gzip"}, "dataset")
    with pytest.raises(UserError, match="train.jsonl.gz: cannot be unpacked"):
        data.fetch_data("a/rows")
    assert not list((tmp_path / "dataset").glob("a*"))


def test_preprocess_with_names_of_the_hub(hub, tmp_path):
    """The PC project's command, word for word but for the script: a data set and a tokenizer that are not here yet."""
    alpaca = [{"instruction": f"问题 {i}", "input": "", "output": "回答"} for i in range(3)]
    hub.add("hfl/alpaca_zh_51k", {"alpaca_data_51k.json": json.dumps(alpaca).encode()}, "dataset")
    tokenizer = {path.name: path.read_bytes() for path in (ROOT / "tokenizer").glob("*.j*")}
    hub.add("Qwen/Qwen2-0.5B", TEXTS | tokenizer | {"model.safetensors": WEIGHTS})
    words = (
        "--dataset_name chinese_alpaca --tokenizer_name Qwen/Qwen2-0.5B --max_length 1024 --output_dir ./data/processed"
    )
    status, out, err = run_script("scripts/prepare_data.py", *words.split())
    assert status == 0 and "tokenised: 3" in out, err
    assert len(rows_of(tmp_path / "data/processed/train.jsonl")) == 3
    status, _, err = run_script("scripts/prepare_data.py", "--dataset_name", "chinese_alpacca")
    assert status == 2 and "chinese_alpacca: no such file" in err and len(err.splitlines()) == 1


def test_a_training_takes_names_of_the_hub(hub, tmp_path, capsys):
    rows = [json.dumps({"text": f"hello {i}"}) for i in range(20)]
    hub.add("a/texts", {"train.jsonl": "\n".join(rows).encode(), "test.jsonl": rows[0].encode()}, "dataset")
    flags = ["--max_steps=1", f"--save_dir={tmp_path / 'out'}", "--data_path=a/texts:2", "--val_path=a/texts"]
    run_stage("pretrain", *flags)
    said = capsys.readouterr().out
    assert f"data: {tmp_path / 'dataset/a--texts.jsonl'}:2" in said and hub.fetched() == ["train.jsonl"]
    assert (tmp_path / "out/pretrain_32.pth").is_file()


# ---- what is said


def test_without_names_it_lists_them(hub):
    status, out, _ = run_script("scripts/download.py")
    assert status == 0 and "pretrain_hq" in out and "MiniMind2-PyTorch" in out and not hub.asked
    status, _, err = run_script("scripts/download.py", "pretrain_hp")
    assert status == 2 and "neither OWNER/NAME nor one of the short names: pretrain_hq" in err
    status, _, err = run_script("scripts/download.py", "dpo", "--offline")
    assert status == 2 and "HF_HUB_OFFLINE forbids" in err and not hub.asked
    status, _, err = run_script("scripts/download.py", "chinese_alpaca", "--source=modelscope")
    assert status == 2 and "is not known to be on modelscope; take --source huggingface" in err
