"""The commands and files of other projects as they stand there, with tiny models where the hub would put theirs."""

import json
import shutil

import pytest
import torch

from common import fetch
from common.console import UserError
from common.files import ROOT
from common.options import parse
from dataset.read import hub as data
from model import hub as models
from model.checkpoint import load_weights, open_weights
from model.config import ModelConfig
from model.interop.hf import config_to_hf, hf_tensors
from model.interop.peft import save_peft
from model.lora import LoRASettings, add_lora, lora_state
from model.transformer import CausalLM
from scripts import lora_quickstart
from tests.helpers.chatglm import write_chatglm3
from tests.helpers.hub import Hub
from tests.helpers.models import small_model
from tests.helpers.rows import write_sft
from tests.helpers.runs import run_script

TOKENIZER_FILES = {path.name: path for path in (ROOT / "tokenizer").glob("*.j*")}
SMALL = "--device cpu --dtype float32 --compile off --max_steps 1 --num_workers 1 --max_length 64".split()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder to run in, beside the data that the pages speak of; nothing is in models/ or in the cache."""
    home = tmp_path / "project"
    (home / "data").mkdir(parents=True)
    monkeypatch.chdir(home)
    monkeypatch.setattr(models, "MODELS", tmp_path / "models")
    monkeypatch.setattr(data, "FOLDER", tmp_path / "dataset")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "PAUSE", 0)
    return home


def write_qwen2(folder) -> None:
    """Qwen2's layout, as `save_pretrained` leaves it, with the shipped tokenizer."""
    from safetensors.torch import save_file

    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    config = ModelConfig(vocab_size=6400, attention_bias=True, **shape)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)), encoding="utf-8")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2"
    torch.manual_seed(0)
    state = {name: tensor.clone() for name, tensor in CausalLM(config).state_dict().items()}
    save_file(hf_tensors(config, state), folder / "model.safetensors")
    for path in TOKENIZER_FILES.values():
        shutil.copy(path, folder)


def test_a_tokenizer_and_an_adapter_by_their_names(home, tmp_path, monkeypatch):
    """Wherever a tokenizer or an adapter is named."""
    folder, adapter = tmp_path / "models/Qwen2-tiny", tmp_path / "models/qwen-lora"
    write_qwen2(folder)
    model = load_weights(folder).build()
    names = add_lora(model, LoRASettings(rank=2, targets=("q_proj",)))
    adapter.mkdir()
    save_peft(adapter, LoRASettings(rank=2).to_dict(), lora_state(model), dict(path=None, hash=None), len(names))
    write_sft(home / "chats.jsonl", 4)
    (home / "texts.jsonl").write_text(json.dumps(dict(text="hello world")) + "\n", encoding="utf-8")
    shape = "--hidden_size=16", "--num_hidden_layers=1", "--num_attention_heads=2"
    for script, *words in (
        ("trainer/train_pretrain.py", "--data_path=texts.jsonl", f"--save_dir={home}", *SMALL, *shape),
        ("scripts/check_data.py", "chats.jsonl"),
    ):
        status, _, err = run_script(script, *words, "--tokenizer_path", "Qwen/Qwen2-tiny")
        assert status == 0, err
    assert load_weights(home / "pretrain_16.pth").tokenizer["path"] == str(folder)
    words = "--weight Qwen/Qwen2-tiny --lora_path someone/qwen-lora --prompt hi --max_new_tokens 2 --device cpu".split()
    status, _, err = run_script("eval_model.py", *words)
    assert status == 0 and f"{adapter}: rank 2, on its base {folder}" in err, err
    status, _, err = run_script("scripts/check_data.py", "chats.jsonl", "--tokenizer_path", "no/such")
    assert status == 2 and "no/such: no such file or directory; as a model on a hub: " in err


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("place", ["models", "cache", "hub"])
def test_the_pc_projects_file_word_for_word(home, tmp_path, monkeypatch, place):
    """`model_name_or_path: Qwen/Qwen2-0.5B` names neither a file nor a folder of ours: it is a copy in models/, one in
    Hugging Face's cache, or fetched."""
    snapshot = tmp_path / "cache/models--Qwen--Qwen2-0.5B/snapshots/c0ffee"
    where = dict(models=tmp_path / "models/Qwen2-0.5B", cache=snapshot, hub=tmp_path / "on_the_hub")[place]
    write_qwen2(where)
    (home / "data/processed").mkdir()
    write_sft(home / "data/processed/train.jsonl", 8)
    shutil.copy(ROOT / "configs/training_config.yaml", home)
    assert "model_name_or_path: Qwen/Qwen2-0.5B\n" in (home / "training_config.yaml").read_text(encoding="utf-8")
    with Hub() as hub:
        if place == "hub":
            hub.add("Qwen/Qwen2-0.5B", files_of(where))
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            monkeypatch.delenv("HF_HUB_OFFLINE")
        status, out, err = run_script("trainer/train_lora.py", "--config", "training_config.yaml", *SMALL)
        assert status == 0 and "done in" in out, err
        assert bool(hub.fetched()) == (place == "hub") == ("fetching 5 files" in err)
    base = where if place != "hub" else tmp_path / "models/Qwen2-0.5B"
    assert f"from: {base}" in out
    adapter = json.loads((home / "results/checkpoints/lora_model/adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == str(base), "peft opens it there"

    words = "--model_name_or_path Qwen/Qwen2-0.5B --output_dir ./results/my_experiment --num_train_epochs 3"
    words = [*words.split(), "--learning_rate", "0.0002", *SMALL]
    status, out, err = run_script("trainer/train_lora.py", "--config", "training_config.yaml", *words)
    assert status == 0 and (home / "results/my_experiment/lora_model").is_dir(), err
    status, out, err = run_script("eval_model.py", "--weight", "Qwen/Qwen2-0.5B", "--prompt=hi", "--max_length=2")
    assert status == 0 and str(base) in err, err


def test_mu_xues_file_word_for_word(home, tmp_path):
    """`base_model_path: "THUDM/chatglm3-6b"`: its own layout, tokenizer and names of layers."""
    write_chatglm3(tmp_path / "models/chatglm3-6b")
    rows = [json.dumps({"system": "沐雪", "conversation": [{"human": "hello", "assistant": "world"}]})] * 6
    folder = tmp_path / "dataset/moemuu"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    shutil.copy(ROOT / "configs/mu_xue.yaml", home / "config.yaml")
    words = ["--config", "config.yaml", *SMALL]
    status, out, err = run_script("trainer/train_lora.py", *words)
    assert status == 0 and f"from: {tmp_path / 'models/chatglm3-6b'}" in out, err
    assert (tmp_path / "model/lora_model/adapter_config.json").is_file(), "output_dir: ../model"


def test_the_quickstart_fetches_the_model_as_the_original_did(home, tmp_path, monkeypatch, capsys):
    """With its first lines. --skip_download ends with the line that says what to give instead."""
    monkeypatch.setattr(lora_quickstart, "ROOT", tmp_path)  # whatever a developer has in out/
    weights = tmp_path / "full_sft_512.pth"
    torch.save(small_model().state_dict(), weights)
    folder = tmp_path / "models/MiniMind2-PyTorch"
    find = lambda *words: lora_quickstart.find_base(parse(lora_quickstart.QuickstartConfig, ["--out_dir=o", *words]))
    with Hub() as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        hub.add("gongjy/MiniMind2-PyTorch", {"full_sft_512.pth": weights.read_bytes()})
        hub.add("gongjy/MiniMind2-Small", {name: path.read_bytes() for name, path in TOKENIZER_FILES.items()})
        with pytest.raises(UserError, match="no weights called 'full_sft'"):
            find("--skip_download")
        with pytest.raises(UserError, match="no weights called 'mine'"):
            find("--from_weight=mine")
        assert not hub.asked
        assert find() == folder / "full_sft_512.pth"
        assert capsys.readouterr().out == f"🔄 开始下载MiniMind2-PyTorch模型...\n✅ 模型下载成功: {folder}\n"
        hub.asked.clear()
        assert find("--skip_download") == find() == folder / "full_sft_512.pth"
        assert not hub.asked and not capsys.readouterr().out, "it is there now"
    assert open_weights(str(folder / "full_sft_512.pth"))[1].path == str(folder), "its tokenizer lies beside it"
