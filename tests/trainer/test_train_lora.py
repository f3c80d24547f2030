"""train_lora.py as a user meets it: what it writes, what it leaves alone, how it continues, what eval makes of it."""

import shlex
import sys

import pytest
import torch

import eval_model
from common.console import UserError
from common.files import ROOT
from model.adapter import load_adapter
from model.checkpoint import load_weights
from model.lora import merge
from tests.helpers.compare import same
from tests.helpers.rows import write_pretrain, write_sft
from tests.helpers.runs import FLAGS, run_script, run_stage, torchrun, train_twice

NAME = "lora/lora_sft_32.pth"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a pretrained model, another one tuned on top, and chats."""
    folder = tmp_path_factory.mktemp("lora")
    write_pretrain(folder / "text.jsonl")
    write_sft(folder / "sft.jsonl")
    run_stage("pretrain", f"--data_path={folder / 'text.jsonl'}", f"--save_dir={folder}", "--max_steps=2")
    run_stage("full_sft", f"--data_path={folder / 'sft.jsonl'}", f"--save_dir={folder}", "--max_steps=2")
    return folder


def lora(world, out, *flags):
    run_stage(
        "lora",
        f"--data_path={world / 'sft.jsonl'}",
        f"--from_weight={world / 'full_sft_32.pth'}",
        "--max_steps=4",
        "--batch_size=8",
        f"--save_dir={out}",
        *flags,
    )
    return load_adapter(out / NAME)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(60).view(2, 30)).logits


def test_an_adapter_in_place_of_weights_names_the_command_that_merges_it(world, tmp_path, monkeypatch):
    """--teacher and --from_weight sent to eval_model.py, which trains nothing. The command makes what they take."""
    adapter = lora(world, tmp_path, "--save_peft")
    monkeypatch.chdir(tmp_path)
    data = [f"--data_path={world / 'sft.jsonl'}", f"--save_dir={tmp_path / 'out'}", "--max_steps=1"]
    for stage, flags in (
        ("full_sft", [f"--from_weight={adapter.path}"]),
        ("distillation", [f"--teacher={adapter.path}", f"--from_weight={world / 'full_sft_32.pth'}"]),
        ("full_sft", [f"--from_weight={adapter.path.with_suffix('')}"]),
    ):
        with pytest.raises(
            UserError, match="is an adapter.*, which eval_model.py takes as --lora_path; .*merge"
        ) as said:
            run_stage(stage, *data, *flags)
    assert "convert.py BASE merged.pth" in str(said.value), "a directory of peft seldom says what it is on"
    with pytest.raises(UserError) as said:
        run_stage("full_sft", *data, f"--from_weight={adapter.path}")
    words = shlex.split(str(said.value).partition("merge it first: python ")[2])
    assert words[:2] == ["scripts/convert.py", str(world / "full_sft_32.pth")]
    assert run_script(*words)[0] == 0
    run_stage("distillation", *data, "--teacher=merged.pth", f"--from_weight={world / 'full_sft_32.pth'}")


def test_a_run_writes_the_adapter_alone_and_leaves_the_base_alone(world, tmp_path, capsys):
    before = (world / "full_sft_32.pth").read_bytes()
    adapter = lora(world, tmp_path, "--val_fraction=0.1", "--lora_rank=4", "--lora_targets=attention", "--use_rslora")
    parent = load_weights(world / "full_sft_32.pth")
    assert (world / "full_sft_32.pth").read_bytes() == before
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.pth"))
    assert written == ["lora/best/lora_sft_32.pth", NAME]
    assert adapter.base == dict(path=str(parent.path), hash=parent.hash)
    assert [entry["stage"] for entry in adapter.lineage] == ["pretrain", "full_sft", "lora_sft"]
    assert (adapter.settings.rank, adapter.settings.targets, adapter.settings.rslora) == (4, ("attention",), True)
    assert all(tensor.abs().max() > 0 for tensor in adapter.state.values())  # B began at 0
    # q 32->32, k and v 32->16, o 32->32, of rank 4, in 2 layers: 2 * 4 * (64 + 48 + 48 + 64) = 1,792
    total = 1792 + sum(tensor.numel() for tensor in parent.state.values())
    assert f"model: {total:,} parameters, 1,792 trained ({1792 / total:.2%})" in capsys.readouterr().out
    (state,) = tmp_path.glob("resume/*/*/step_*")
    assert sum(file.stat().st_size for file in state.iterdir()) < 60_000  # the base would be 940,000 more


def test_what_can_be_written_besides(world, tmp_path):
    """peft's directory, and full weights whose logits are the adapter's. Both with the names that S0 and S2 promise."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    out = tmp_path / "out"
    adapter = lora(world, out, "--save_peft", "--merge_lora", "--lora_r=4")
    parent = load_weights(world / "full_sft_32.pth")
    expected = logits(adapter.apply(parent.build()))
    merged = load_weights(out / "lora_sft_merged_32.pth")
    torch.testing.assert_close(logits(merged.build()), expected, atol=1e-5, rtol=1e-5)
    assert merged.lineage == adapter.lineage

    from model.export import save_hf

    save_hf(tmp_path / "base", parent, ROOT / "tokenizer", stop_ids={2})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, out / NAME.removesuffix(".pth"))
    torch.testing.assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-5)
    again = load_adapter(out / NAME.removesuffix(".pth"))
    assert again.base == adapter.base  # our own directory knows its base too


def test_output_dir_writes_hugging_faces_layout_beside(world, tmp_path):
    """`final_model/` of full tuning and `lora_model/` of LoRA, as MuXue's configuration names them."""
    transformers = pytest.importorskip("transformers")
    data = [f"--data_path={world / 'sft.jsonl'}", f"--output_dir={tmp_path}", "--max_steps=2"]
    run_stage("full_sft", *data, f"--from_weight={world / 'pretrain_32.pth'}")
    run_stage("lora", *data, f"--from_weight={tmp_path / 'full_sft_32.pth'}")
    folder, ours = tmp_path / "final_model", load_weights(tmp_path / "full_sft_32.pth").build()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(load_weights(folder).build()), logits(ours))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(theirs.config.eos_token_id) == "<|endoftext|><|im_end|>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)
    assert chat == "<|im_start|>user\n你好<|im_end|>\n"
    assert (tmp_path / "lora_model" / "adapter_config.json").is_file() and (tmp_path / NAME).is_file()


def test_what_transformers_lacks_is_said_and_the_run_ends_well(tmp_path, capsys):
    write_pretrain(tmp_path / "text.jsonl")
    run_stage(
        "pretrain", f"--data_path={tmp_path / 'text.jsonl'}", f"--output_dir={tmp_path}", "--max_steps=1", "--use_moe"
    )
    said = capsys.readouterr().out
    assert "not written: " in said and "qwen3_moe would need qk_norm True" in said
    assert (tmp_path / "pretrain_32_moe.pth").is_file() and not (tmp_path / "final_model").exists()


@pytest.mark.parametrize("flags", [["--lora_dropout=0.3"], ["--dtype=bfloat16", "--lora_targets=attention"]])
def test_a_stopped_run_continues_bit_for_bit(flags, world, tmp_path, stop_at):  # noqa: F811
    flags = [*flags, f"--data_path={world / 'sft.jsonl'}", f"--from_weight={world / 'full_sft_32.pth'}"]
    flags += ["--max_steps=8", "--batch_size=4", "--save_interval=3"]
    whole, parts = train_twice("lora", tmp_path, stop_at, [2, 5], *flags)
    assert same(whole, parts) and all(".adapters.default." in name for name in whole)


@pytest.mark.soak  # the compiler takes half a minute
@pytest.mark.skipif(sys.platform == "win32", reason="needs a C++ compiler")
def test_compiled_is_the_same(world, tmp_path):
    """The first block gets an input without a gradient, the others one with: both graphs compute what eager does."""
    eager = lora(world, tmp_path / "eager")
    compiled = lora(world, tmp_path / "compiled", "--compile=on")
    for name, tensor in eager.state.items():
        torch.testing.assert_close(compiled.state[name], tensor, atol=2e-4, rtol=1e-3)


def test_another_base_or_other_settings_do_not_continue_a_run(world, tmp_path):
    lora(world, tmp_path)
    with pytest.raises(ValueError, match="lora was .*is "):
        lora(world, tmp_path, "--from_resume=1", "--lora_rank=2")
    with pytest.raises(ValueError, match="parent was .*is "):
        run_stage(
            "lora",
            f"--data_path={world / 'sft.jsonl'}",
            f"--from_weight={world / 'pretrain_32.pth'}",
            "--max_steps=4",
            "--batch_size=8",
            f"--save_dir={tmp_path}",
            "--from_resume=1",
        )


def test_torchrun_trains_the_same_adapter(world, tmp_path):
    one = lora(world, tmp_path / "one")
    torchrun(
        "train_lora.py",
        *FLAGS,
        f"--data_path={world / 'sft.jsonl'}",
        "--max_steps=4",
        "--batch_size=4",
        f"--from_weight={world / 'full_sft_32.pth'}",
        f"--save_dir={tmp_path / 'two'}",
        cwd=ROOT / "trainer",
    )
    two = load_adapter(tmp_path / "two" / NAME)
    for name, tensor in one.state.items():
        torch.testing.assert_close(two.state[name], tensor, atol=1e-5, rtol=1e-4)


def test_packed_rows_compute_what_single_ones_do(world, tmp_path):
    """Eight examples of a step in rows of 64 (two each) or of 256 (nearly all in one): the same adapter."""
    rows = [line for line in (world / "sft.jsonl").read_text(encoding="utf-8").splitlines() if len(line) < 170]
    (tmp_path / "short.jsonl").write_text("\n".join(rows), encoding="utf-8")
    flags = [
        f"--data_path={tmp_path / 'short.jsonl'}",
        f"--from_weight={world / 'full_sft_32.pth'}",
        "--max_steps=4",
        "--batch_size=8",
    ]
    found = []
    for length in (64, 256):
        run_stage("lora", *flags, f"--max_seq_len={length}", f"--save_dir={tmp_path / str(length)}", "--on_long=drop")
        found.append(load_adapter(tmp_path / str(length) / "lora/lora_short_32.pth"))  # named after its data
    assert found[0].lineage[-1]["rows"] == found[1].lineage[-1]["rows"] == len(rows)
    assert found[0].lineage[-1]["losses"]["loss"] == pytest.approx(found[1].lineage[-1]["losses"]["loss"], abs=1e-5)
    for name, tensor in found[0].state.items():  # where a gradient is nearly 0, Adam makes much of a rounding error
        torch.testing.assert_close(found[1].state[name], tensor, atol=2e-4, rtol=1e-4)


# ---- mistakes


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--lora_targets=c_attn"], "--lora_targets c_attn: no such linear layer; this model has down_proj,"),
        (["--use_lora=false"], "--use_lora false: tuning all weights is trainer/train_full_sft.py"),
        (["--lora_rank=100000"], "--lora_rank 100000: the layers that it adapts have a rank of at most 32; 8 to 64"),
        (["--lora_rank=0"], "--use_lora and --lora_rank 0: an adapter has a rank of at least 1"),
        (["--lora_name=lora_weather", "--data_path="], "no dataset/lora_weather.jsonl"),
        (["--output_dir=elsewhere"], "--save_dir and --output_dir: both say where results go"),
    ],
)
def test_mistakes_are_named(flags, words, world, tmp_path, capsys):
    """`trainer.stage.run` makes one line and status 2 of either kind (tests/common/test_config.py)."""
    data = [] if "--data_path=" in flags else [f"--data_path={world / 'sft.jsonl'}"]
    with pytest.raises((ValueError, SystemExit)) as error:
        run_stage(
            "lora",
            *data,
            f"--save_dir={tmp_path}",
            f"--from_weight={world / 'full_sft_32.pth'}",
            *(flag for flag in flags if flag != "--data_path="),
        )
    assert words in str(error.value) + capsys.readouterr().err and not list(tmp_path.rglob("*.pth"))


# ---- talking to it


@pytest.fixture
def ask(capsys):
    """One answer of eval_model.py -> (what it said, its remarks)."""

    def answer(*flags):
        capsys.readouterr()
        flags = ["--device=cpu", "--dtype=float32", "--temperature=0", "--max_new_tokens=4", "--prompt=hello", *flags]
        eval_model.main(list(map(str, flags)))
        return capsys.readouterr()

    return answer


def test_the_adapters_own_base_is_found_whatever_the_mode_says(world, tmp_path, ask):
    """MiniMind's README runs `--lora_name lora_medical --model_mode 2`, which puts it onto weights it never saw."""
    lora(world, tmp_path, "--max_steps=30", "--save_peft")
    base = load_weights(world / "full_sft_32.pth")
    other = tmp_path / "full_sft_32.pth"  # lies where names are looked up, and is not what the adapter belongs to
    other.write_bytes((world / "pretrain_32.pth").read_bytes())
    plain, _ = ask("--weight", base.path)
    said, notes = ask("--lora_name=lora_sft", "--model_mode=2", f"--save_dir={tmp_path}")
    assert f"{tmp_path / NAME}: rank 8, on its base {base.path}" in notes and said != plain
    assert "pretrain -> full_sft -> lora_sft" in notes
    merged, notes = ask(f"--lora_path={tmp_path}", "--merge_lora")
    assert merged == said and "merged" in notes
    assert ask("--lora_path", tmp_path / "lora" / "lora_sft_32")[0] == said  # peft's directory

    with pytest.raises(ValueError, match="was trained on .*full_sft_32.pth .*, not on .*pretrain_32.pth"):
        ask("--lora_name=lora_sft", f"--save_dir={tmp_path}", "--weight", world / "pretrain_32.pth")


def test_a_base_that_was_moved_is_found_by_its_hash_and_one_that_is_gone_is_named(world, tmp_path, ask):
    base = tmp_path / "base_32.pth"
    base.write_bytes((world / "full_sft_32.pth").read_bytes())
    run_stage(
        "lora", f"--data_path={world / 'sft.jsonl'}", f"--from_weight={base}", "--max_steps=2", f"--save_dir={tmp_path}"
    )
    base.rename(tmp_path / "renamed_32.pth")
    (tmp_path / "aaa_32.pth").write_bytes(b"damaged")
    _, notes = ask("--lora_name=lora_sft", f"--save_dir={tmp_path}")
    assert f"on its base {tmp_path / 'renamed_32.pth'}" in notes
    (tmp_path / "renamed_32.pth").unlink()
    with pytest.raises(ValueError, match=f"was trained on {base} .*bring them back"):
        ask("--lora_name=lora_sft", f"--save_dir={tmp_path}")


def test_merging_before_rounding(world, tmp_path):
    """In bf16 the weights hold 8 bits: what an adapter adds is put in while there are still 24."""
    adapter = lora(world, tmp_path)
    model = adapter.apply(load_weights(world / "full_sft_32.pth").build())
    expected = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model.to(torch.bfloat16)).float(), expected, atol=0.2, rtol=0.1)


def test_muon_takes_an_adapter_which_is_nothing_but_matrices(world, tmp_path):
    """AdamW, which has the rest, has nothing then, and said so with a traceback."""
    adapter = lora(world, tmp_path, "--optimizer=muon")
    assert all(tensor.abs().max() > 0 for tensor in adapter.state.values())
