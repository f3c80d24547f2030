"""What is already there when a run writes: nothing that somebody may still need disappears without a word."""

import json

import pytest
import torch

from common.manifest import write_manifest
from dataset.tokens import token_cache
from model.adapter import find_base, load_adapter
from model.checkpoint import find_weights, load_weights
from tests.helpers.compare import same, state_of
from tests.helpers.rows import write_pretrain, write_reason, write_sft
from tests.helpers.runs import run_stage
from tokenizer.find import tokenizer_of
from tokenizer.text import Tokenizer
from trainer.loop import engine
from trainer.run import resume
from trainer.train_tokenizer import save, train_bpe


@pytest.fixture
def pretrain(tmp_path):
    data = write_pretrain(tmp_path / "text.jsonl")
    return lambda *flags: run_stage(
        "pretrain", f"--data_path={data}", f"--save_dir={tmp_path}", "--batch_size=8", *flags
    )


def test_weights_are_not_written_over_those_they_start_from(pretrain, tmp_path):
    """`--from_weight pretrain` for a second round: after its first save the parent was gone, and with it what
    --from_resume needs to know the run again."""
    pretrain("--max_steps=2")
    before = (tmp_path / "pretrain_32.pth").read_bytes()
    with pytest.raises(ValueError, match="pretrain_32.pth: this run starts from these.*--save_weight, pretrain_2"):
        pretrain("--max_steps=4", "--from_weight=pretrain")
    assert (tmp_path / "pretrain_32.pth").read_bytes() == before
    pretrain("--max_steps=4", "--from_weight=pretrain", "--save_weight=pretrain_2")
    pretrain("--max_steps=6", "--from_weight=pretrain", "--save_weight=pretrain_2", "--from_resume=auto")
    assert load_weights(tmp_path / "pretrain_2_32.pth").lineage[-1]["steps"] == 6


def test_weights_are_not_written_over_their_own_backup(pretrain, tmp_path):
    """Going back to the version before, and training it again: the first save moved pretrain_32.pth over the backup
    that the run had started from, and the parent was nowhere on the disk."""
    for seed in (1, 2):
        pretrain("--max_steps=1", f"--seed={seed}")
    before = (tmp_path / "pretrain_32.previous.pth").read_bytes()
    with pytest.raises(ValueError, match="pretrain_32.previous.pth: this run starts from these.*--save_weight"):
        pretrain("--max_steps=1", f"--from_weight={tmp_path / 'pretrain_32.previous.pth'}")
    assert (tmp_path / "pretrain_32.previous.pth").read_bytes() == before
    pretrain("--max_steps=1", f"--from_weight={tmp_path / 'pretrain_32.previous.pth'}", "--save_weight=third")


@pytest.mark.parametrize(
    "first, second, said",
    [
        (["full_sft", "--use_lora"], ["full_sft"], "lora was"),
        (["full_sft"], ["full_sft", "--use_lora"], "lora was null"),
        (["distill_reason"], ["full_sft"], 'stage was "reason", is "full_sft"'),
    ],
)
def test_a_state_of_another_kind_of_run_is_not_continued(pretrain, tmp_path, first, second, said):
    """`--from_resume auto` without the --use_lora of before ended in a KeyError; reasoning went on as fine-tuning,
    with its moments, and nobody was told."""
    write_reason(tmp_path / "sft.jsonl")
    pretrain("--max_steps=1")
    common = [f"--data_path={tmp_path / 'sft.jsonl'}", f"--save_dir={tmp_path}", "--save_weight=z", "--max_seq_len=64"]
    common += [f"--from_weight={tmp_path / 'pretrain_32.pth'}"]
    run_stage(*first, *common, "--max_steps=1")
    with pytest.raises(ValueError, match=said):
        run_stage(*second, *common, "--max_steps=2", "--from_resume=auto")
    run_stage(*first, *common, "--max_steps=2", "--from_resume=auto")


def test_a_version_that_tokenises_otherwise_does_not_continue_a_run(pretrain, tmp_path, monkeypatch):
    """An upgrade that raised FORMAT made the tokens anew, and the run went on with other rows. States from before the
    format was recorded are of its time."""
    pretrain("--max_steps=2")
    (state,) = tmp_path.glob("resume/*/*/step_00000002")
    values = resume.read_values(state)
    assert values["identity"].pop("token_format") == token_cache.FORMAT
    (state / "state.json").write_text(json.dumps(values), encoding="utf-8")
    write_manifest(state, [path.name for path in state.iterdir() if path.name != "manifest.json"])
    pretrain("--max_steps=3", "--from_resume=auto")
    with monkeypatch.context() as patch:
        for module in (token_cache, engine):
            patch.setattr(module, "FORMAT", 7)
        with pytest.raises(ValueError, match="data was .* token_format was 6, is 7.*keeps .*how it was tokenised"):
            pretrain("--max_steps=4", "--from_resume=auto")
    pretrain("--max_steps=4", "--from_resume=auto")


def test_a_continued_step_keeps_its_examples_and_says_so(pretrain, tmp_path, capsys):
    """--accumulation_steps 4 on resume was ignored, while the log and the weights said that it was now 4."""
    pretrain("--max_steps=2")
    pretrain("--max_steps=4", "--accumulation_steps=4", "--from_resume=auto")
    said = capsys.readouterr().out
    assert "--accumulation_steps 1 instead of 4: a continued run keeps the 8 examples of a step" in said
    assert "accumulation_steps 1 -> 4" not in said
    pretrain("--max_steps=6", "--batch_size=2", "--from_resume=auto")
    said = capsys.readouterr().out
    assert "--accumulation_steps 4 instead of 1" in said and "accumulation_steps 1 -> 4" in said


def test_a_fresh_run_of_the_same_name_keeps_what_the_last_one_wrote(pretrain, tmp_path, capsys):
    """A trial of 1 step after a week of training. What was trained on the older weights finds them by their hash."""
    pretrain("--max_steps=3", "--val_fraction=0.2")
    write_sft(tmp_path / "sft.jsonl")
    run_stage(
        "lora",
        f"--data_path={tmp_path / 'sft.jsonl'}",
        "--from_weight=pretrain",
        f"--save_dir={tmp_path}",
        "--max_steps=1",
    )
    old = {path: state_of(path) for path in (tmp_path / "pretrain_32.pth", tmp_path / "best" / "pretrain_32.pth")}
    pretrain("--max_steps=1", "--val_fraction=0.2", "--seed=7")
    assert "pretrain_32.pth is replaced; what it was is now pretrain_32.previous.pth" in capsys.readouterr().out
    for path, weights in old.items():
        assert same(state_of(path.with_name("pretrain_32.previous.pth")), weights) and not same(state_of(path), weights)
    assert find_weights("pretrain", tmp_path) == tmp_path / "pretrain_32.pth", "a bare name never means the previous"
    adapter = load_adapter(tmp_path / "lora" / "lora_sft_32.pth")
    assert find_base(adapter, None, tmp_path).path == tmp_path / "pretrain_32.previous.pth"

    pretrain("--max_steps=2", "--val_fraction=0.2", "--seed=7", "--from_resume=auto")
    kept = state_of(tmp_path / "pretrain_32.previous.pth")
    assert same(kept, old[tmp_path / "pretrain_32.pth"]), "its own weights are no other run's"


def test_a_continued_run_does_not_take_another_ones_weights_for_its_own(pretrain, tmp_path, capsys):
    """A was killed, B of the same name finished, A goes on: B's weights were replaced without a word."""
    pretrain("--max_steps=2", "--seed=1")
    pretrain("--max_steps=3", "--seed=2")
    of_b = state_of(tmp_path / "pretrain_32.pth")
    capsys.readouterr()
    pretrain("--max_steps=4", "--seed=1", "--from_resume=auto")
    assert "resumed after step 2" in (said := capsys.readouterr().out) and "is replaced" in said
    assert same(state_of(tmp_path / "pretrain_32.previous.pth"), of_b)


def test_the_same_command_twice_starts_from_the_same_base(pretrain, tmp_path, monkeypatch):
    """With --output_dir: the second time it found its own result first, under the base's name."""
    from trainer import inputs as prepare

    pretrain("--max_steps=1")
    write_sft(tmp_path / "sft.jsonl")
    (tmp_path / "out").mkdir()
    base = (tmp_path / "pretrain_32.pth").rename(tmp_path / "out" / "full_sft_32.pth")
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    for _ in range(2):
        run_stage(
            "full_sft",
            f"--data_path={tmp_path / 'sft.jsonl'}",
            "--max_steps=1",
            "--from_weight=full_sft",
            f"--output_dir={tmp_path / 'mine'}",
        )
    parent = load_weights(tmp_path / "mine" / "full_sft_32.pth").lineage[-1]["parent"]
    assert parent == load_weights(base).hash


def test_merged_and_exported_weights_are_not_written_over_either(pretrain, tmp_path):
    write_sft(tmp_path / "sft.jsonl")
    common = [f"--data_path={tmp_path / 'sft.jsonl'}", "--max_steps=1"]
    pretrain("--max_steps=1", f"--output_dir={tmp_path}")
    lora = ["lora", *common, f"--save_dir={tmp_path}", "--lora_name=x", "--merge_lora"]
    run_stage(*lora, "--from_weight=pretrain")
    with pytest.raises(ValueError, match="x_merged_32.pth: this run starts from these weights"):
        run_stage(*lora, "--from_weight=x_merged")
    with pytest.raises(ValueError, match="final_model: this run starts from these weights"):
        run_stage("full_sft", *common, f"--from_weight={tmp_path / 'final_model'}", f"--output_dir={tmp_path}")


def test_a_finished_run_that_is_continued_has_its_weights(pretrain, tmp_path):
    """Killed between the last state and the weights: nothing was left to do, and `done` named a file that was not."""
    pretrain("--max_steps=3")
    path = tmp_path / "pretrain_32.pth"
    before = state_of(path)
    path.unlink()
    pretrain("--max_steps=3", "--from_resume=auto")
    assert same(state_of(path), before)


def test_a_tokenizer_that_is_replaced_stays_for_its_weights(tmp_path, capsys):
    out = tmp_path / "out"
    save(train_bpe(iter(["a sparrow is small"] * 9), 300), out / "tokenizer")
    first = Tokenizer.load(out / "tokenizer")
    save(train_bpe(iter(["a sparrow is small"] * 9), 300), out / "tokenizer")
    assert [path.name for path in out.iterdir()] == ["tokenizer"], "the same again is no other one"
    save(train_bpe(iter(["麻雀虽小"] * 9), 290), out / "tokenizer")
    assert f"is now in {out / f'tokenizer-{first.hash[:12]}'}" in capsys.readouterr().out
    recorded = dict(path=str(out / "tokenizer"), hash=first.hash)
    assert tokenizer_of(recorded, out / "pretrain_32.pth", first.vocab_size).hash == first.hash
    second = Tokenizer.load(out / "tokenizer").hash
    assert second != first.hash

    (out / "tokenizer" / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}', encoding="utf-8")
    save(train_bpe(iter(["麻雀虽小"] * 9), 290), out / "tokenizer")  # half an hour of training is not lost to that
    assert Tokenizer.load(out / "tokenizer").hash == second


def test_a_link_a_copy_or_a_warning(tmp_path, monkeypatch):
    """File systems without links get a copy; where there is no space for one, the run goes on and says so."""
    from common import files

    def fails(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "x_32.pth"
    assert files.keep_previous(path) == ""
    monkeypatch.setattr(files.os, "link", fails)
    torch.save({"a": torch.ones(2)}, path)
    assert files.keep_previous(path) == f"{path} is replaced; what it was is now x_32.previous.pth"
    kept = tmp_path / "x_32.previous.pth"
    assert kept.read_bytes() == path.read_bytes()
    kept.unlink()
    monkeypatch.setattr(files.shutil, "copy2", fails)
    line = f"warning: {path} is replaced and could not be kept (No space left on device)"
    assert files.keep_previous(path) == line
    assert list(tmp_path.iterdir()) == [path]


def test_of_adapters_every_version_is_kept(tmp_path):
    """The third run in a folder destroyed the first one's adapter."""
    from common.files import keep_previous

    path = tmp_path / "x_32.pth"
    for version in ("1", "2", "3"):
        if version != "1":
            assert "what it was is now x_32.previous" in keep_previous(path, every=True)
            path.unlink()
        path.write_text(version)
    names = ("x_32.previous.pth", "x_32.previous2.pth", "x_32.pth")
    assert [(tmp_path / name).read_text() for name in names] == ["1", "2", "3"]


def test_a_run_that_has_done_more_than_is_asked_for_says_so(pretrain):
    """It printed `resumed after step 3 of 2 ... done`."""
    pretrain("--max_steps=3")
    with pytest.raises(ValueError, match="has done 3 steps, and --max_steps or --epochs ask for 2"):
        pretrain("--max_steps=2", "--from_resume=auto")


def test_rows_longer_than_the_model_is_made_for_are_refused(pretrain, capsys):
    """They were trained on, and eval_model.py then refused prompts of that length."""
    with pytest.raises(ValueError, match="--max_seq_len 32: the model is made for 16 positions"):
        pretrain("--max_steps=1", "--max_position_embeddings=16")
    with pytest.raises(ValueError, match="--max_seq_len 2000000000: the model is made for 32768 positions"):
        pretrain("--max_steps=1", "--max_seq_len=2000000000")
    pretrain("--max_steps=2", "--warmup_steps=100")
    assert "warning: --warmup_steps 100 is not over in 2 steps: the rate stays below 0.01" in capsys.readouterr().out


def test_a_fresh_model_that_does_not_fit_says_how_large_it_would_be(pretrain, monkeypatch):
    """--hidden_size 5000000 for 512, say; it ended in a traceback of the allocator."""

    def no_memory(shape):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 25600000000 bytes.")

    with pytest.raises(ValueError, match="hidden_size 5000000 is too wide"):
        pretrain("--hidden_size=5000000")
    monkeypatch.setattr("trainer.inputs.CausalLM", no_memory)
    with pytest.raises(ValueError, match=r"would have 2.,...,... parameters.* --hidden_size \(now 1024\)"):
        pretrain("--hidden_size=1024")


def test_going_on_from_an_older_state_keeps_what_came_after_it(pretrain, tmp_path, capsys):
    """The weights are those of step 4, and going on from step 2 replaces them."""
    pretrain("--max_steps=4", "--save_interval=2", "--keep_last=2")
    later = state_of(tmp_path / "pretrain_32.pth")
    [state] = tmp_path.glob("resume/pretrain_32/*/step_00000002")
    capsys.readouterr()
    pretrain("--max_steps=3", f"--from_resume={state}")
    assert "is replaced" in capsys.readouterr().out
    assert same(state_of(tmp_path / "pretrain_32.previous.pth"), later)
