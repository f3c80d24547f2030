"""YAML keys and values as people have them from other trainers: understood, or answered with what to write."""

from dataclasses import dataclass

import pytest

from common.options import Options, option, owners, parse, specs
from common.values import SEEDS
from common.yaml_file import read_yaml
from dataset.tiny_world.__main__ import WorldConfig
from eval_model import EvalConfig
from scripts.check_data import CheckConfig
from scripts.compare_models import CompareConfig
from scripts.demo import DemoConfig
from scripts.lora_quickstart import QuickstartConfig
from scripts.prepare_data import PrepareConfig
from trainer.train_distillation import DistillationConfig
from trainer.train_full_sft import SFTConfig
from trainer.train_lora import LoRAConfig
from trainer.train_tokenizer import TokenizerConfig


def read(tmp_path, text: str) -> SFTConfig:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    return parse(SFTConfig, ["--config", str(tmp_path / "recipe.yaml")])


def complaint(tmp_path, capsys, text: str) -> str:
    with pytest.raises(SystemExit) as end:
        read(tmp_path, text)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.partition("recipe.yaml")[2]


def test_keys_of_transformers_peft_and_llama_factory(tmp_path, capsys):
    """`task_type` was answered with "did you mean task_data?"."""
    config = read(
        tmp_path,
        """
        model: {torch_dtype: bfloat16, trust_remote_code: true}
        lora: {finetuning_type: lora, lora_target: [q_proj, v_proj], bias: none, task_type: CAUSAL_LM}
        data: {train_file: a.jsonl, validation_file: b.jsonl, preprocessing_num_workers: 2}
        training:
          warmup_ratio: 0.1
          optim: adamw_torch_fused
          report_to: [wandb, tensorboard]
          run_name: mine
          logging_dir: logs
        """,
    )
    assert (config.dtype, config.trains_adapter, config.lora_targets) == ("bfloat16", True, ("q_proj", "v_proj"))
    assert config.data_path[0].endswith("/a.jsonl") and config.val_path[0].endswith("/b.jsonl")
    assert (config.warmup_steps, config.optimizer, config.num_workers) == (0.1, "adamw", 2)
    assert config.use_wandb and config.use_tensorboard and not config.use_swanlab and config.wandb_run_name == "mine"
    assert capsys.readouterr().err.endswith("training.logging_dir: logs are in runs/ below --save_dir\n")


@pytest.mark.parametrize(
    "text, answer",
    [
        ("optim: paged_adamw_8bit", "moments of 8 bits are not built yet; write optimizer: adamw"),
        ("optim: sgd", "there is no such optimiser here; write optimizer: adamw"),
        ("report_to: [wandb, mlflow]", "mlflow is none of wandb, swanlab, tensorboard, none"),
        ("bias: all", "biases are not trained with an adapter; write bias: none"),
        ("task_type: SEQ_CLS", "only language models are trained here"),
        ("warmup_ratio: 100", "expected a share of the run, in [0, 1); a number of steps is warmup_steps"),
        ("warmup_ratio: 0.1\nwarmup_steps: 50", "both set warmup_steps, to different values"),
        ("report_to: wandb\nuse_wandb: false", "both set use_wandb, to different values"),
        ("trust_remote_code: perhaps", "say true or false"),
    ],
)
def test_what_cannot_be_translated_says_what_to_write(text, answer, tmp_path, capsys):
    assert answer in complaint(tmp_path, capsys, text)


def test_the_same_on_a_command_line():
    words = "--report_to tensorboard --optim muon --warmup-ratio 0.2 --bias none --task_type CAUSAL_LM".split()
    config = parse(SFTConfig, words)
    assert (config.use_tensorboard, config.optimizer, config.warmup_steps) == (True, "muon", 0.2)
    assert not parse(SFTConfig, ["--report_to", "none"]).use_wandb


def test_numbers_mean_what_is_written(tmp_path, capsys):
    """YAML 1.1 reads 010 as 8 (octal), 12:30 as 750 (base 60), and 2026-01-02 as a date."""
    config = read(tmp_path, "seed: 010\nsave_weight: 010\nwandb_run_name: 12:30\nlearning_rate: 5e-4\nbatch_size: 1_0")
    assert (config.seed, config.save_weight, config.wandb_run_name) == (10, "010", "12:30")
    assert (config.learning_rate, config.batch_size) == (5e-4, 10)
    assert complaint(tmp_path, capsys, "epochs: 12:30") == ": epochs 12:30: expected a whole number"
    assert complaint(tmp_path, capsys, "batch_size: [010, 2]") == ": batch_size [010, 2]: expected a single value"
    (tmp_path / "dates.yaml").write_text("a: 2026-01-02\nb: true\nc:\n0x10: .5", encoding="utf-8")
    assert read_yaml(str(tmp_path / "dates.yaml")) == {"a": "2026-01-02", "b": True, "c": None, "0x10": ".5"}


@pytest.mark.parametrize("flag", ["--config", "--data_mapping"])
def test_a_file_in_utf_16_is_named_with_what_to_do(flag, tmp_path, capsys):
    from tests.helpers.runs import run_script

    (tmp_path / "u.yaml").write_bytes("epochs: 1".encode("utf-16"))
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "hello"}\n', encoding="utf-8")
    words = [f"--data_path={data}", f"--save_dir={tmp_path}"]
    status, _, err = run_script("trainer/train_pretrain.py", *words, flag, tmp_path / "u.yaml")
    assert (status, err) == (2, f"error: {flag} {tmp_path / 'u.yaml'}: not UTF-8; save it as UTF-8\n")


def test_a_config_in_this_directory_is_not_taken_unasked(tmp_path, monkeypatch, capsys):
    """Mu Xue's script does take it."""
    (tmp_path / "config.yaml").write_text("epochs: 7", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert parse(SFTConfig, []).epochs != 7
    assert "to use it: --config config.yaml" in capsys.readouterr().err
    assert parse(SFTConfig, ["--config", "config.yaml"]).epochs == 7
    assert parse(SFTConfig, ["--epochs", "3"]).epochs == 3 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "words, name",
    [
        ("", "lora_identity"),
        ("--data_path data/chats.jsonl:3 more.jsonl", "lora_chats"),
        ("--data_path dataset/lora_medical.jsonl", "lora_medical"),
        ("--data_path chats.jsonl --lora_name mine", "mine"),
        ("--data_path chats.jsonl --save_weight lora_identity", "lora_identity"),
    ],
)
def test_an_adapter_is_named_after_its_data(words, name):
    """Every one without a name was called lora_identity, and replaced the one before."""
    assert parse(LoRAConfig, words.split()).save_weight == name


@dataclass(frozen=True)
class Named(Options):
    """Options of a script that takes names without a flag."""

    files: tuple[str, ...] = option((), "names")
    name: str = option("", "a name")
    many: tuple[str, ...] = option((), "other names")
    check: bool = option(False, "a switch")


@pytest.mark.parametrize(
    "words", ["a b --check", "--check a b", "--name x a b --check", "a --check true b", "--name=x a --check b"]
)
def test_names_without_a_flag_stand_anywhere(words):
    config = parse(Named, words.split(), bare="files")
    assert config.files == ("a", "b") and config.check and config.name in ("", "x")


def test_a_word_that_could_belong_to_a_flag_does():
    config = parse(Named, "--many a b --name c --check no --files d".split(), bare="files")
    assert config == Named(files=("d",), name="c", many=("a", "b"))


@pytest.mark.parametrize("words", ["a b", "a --check b", "--name a b", "--check a b"])
def test_one_name_is_one(words, capsys):
    with pytest.raises(SystemExit):
        parse(Named, words.split(), bare="name")
    assert "b: unknown option" in (err := capsys.readouterr().err) or "--check b: say true or false" in err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("训练：\n  epochs: 1\n", ":1: the colon is a Chinese one; write `: `, with a space after it"),
        ("epochs：1\n", ":1: the colon is a Chinese one; write `: `, with a space after it"),
        ("a: 1\nepochs:1\nseed: 2\n", ":2: no space after the colon; write `key: value`"),
        ("# mine\nepochs:1\n", ":2: no space after the colon; write `key: value`"),
        ("training:\n\tepochs: 1\n", ":2: a tab indents this line; use spaces"),
        ("epochs: 1\nepochs: 2\n", ":2: epochs stands twice"),
        ("data_path: [a.jsonl\n", ":2: expected ',' or ']', but got '<stream end>'"),
        ("just words\n", ": expected `key: value` lines, found a str"),
    ],
)
def test_usual_slips_in_yaml_are_named_in_plain_words(text, reason, tmp_path, capsys):
    """ "mapping values are not allowed here" was the answer to a Chinese colon, with the line after it."""
    assert complaint(tmp_path, capsys, text) == reason


def test_a_value_may_look_like_a_slip(tmp_path):
    (tmp_path / "a.yaml").write_text('a: "你好：x"\nb: 你好：x\nc: http://host:80\n- ', encoding="utf-8")
    with pytest.raises(ValueError, match="a.yaml:4: "):
        read_yaml(str(tmp_path / "a.yaml"))


def test_numbers_that_nobody_can_mean_are_refused():
    """They ended in tracebacks: lengths of rows are kept in 32 bits, and an ETA has at most 10^9 days."""
    assert SFTConfig(max_seq_len=2**31 - 1, epochs=10**7, max_steps=10**10, ddp_timeout=1e30).problems() == [
        "--max_seq_len 2147483647: must be in [2, 2147483646]",
        "--epochs 10000000: must be in [1, 1000000]",
        "--max_steps 10000000000: must be in [0, 1000000000]",
        "--ddp_timeout 1e+30: must be in (0, 1000000000]",
    ]
    assert CheckConfig(("a",), max_seq_len=2**31).problems() and PrepareConfig(max_seq_len=2**31).problems()
    assert TokenizerConfig(chinese_weight=1e9).problems()
    assert DistillationConfig(teacher="a", temperature=1e300, top_k=4).problems() == [
        "--temperature 1e+300: must be in [0.01, 100]",
        "--top_k: only --write_logprobs takes it; from a file, all ids in it count",
    ]


@pytest.mark.parametrize(
    ("line", "bound"),
    [
        ("seed: 99999999999999999999", "[0, 9223372036854775808)"),
        ("temperature: 1e309", None),
        ("top_k: 100000000000000000000", "[0, 10000000]"),
        ("repetition_penalty: 1e-45", "[0.01, 100]"),
        ("repetition_penalty: 1e38", "[0.01, 100]"),
    ],
)
def test_numbers_that_torch_or_fp32_cannot_hold_are_refused(line, bound, tmp_path, capsys):
    """They ended in a traceback, or in "the model computes NaN": repetition_penalty had done it."""
    (tmp_path / "recipe.yaml").write_text(line, encoding="utf-8")
    with pytest.raises(SystemExit):
        parse(EvalConfig, ["--config", str(tmp_path / "recipe.yaml")])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("expected a number" if bound is None else f"must be in {bound}") in said


SEEDED = [SFTConfig, EvalConfig, CompareConfig, DemoConfig, QuickstartConfig, PrepareConfig, WorldConfig]


@pytest.mark.parametrize("script, flag", [(s, f) for s in SEEDED for f in specs(s) if f.endswith("seed")])
def test_the_largest_seed_is_taken_everywhere_and_the_next_one_is_not(script, flag):
    wrong = lambda seed: [line for line in script(**{flag: seed}).problems() if line.startswith(f"--{flag} {seed}:")]
    assert not wrong(0) and not wrong(2**63 - 1) and wrong(2**63) and wrong(-1)


def test_the_bound_of_seeds_is_that_of_every_script(monkeypatch):
    """prepare_data.py --seed 18446744073709551616 ended in a traceback."""
    monkeypatch.setattr("common.options.SCRIPTS", ("trainer/*.py", "*.py", "scripts/*.py"))
    found = {flag: owners(flag) for flag in ("seed", "question_seed", "world_seed")}
    assert len(found["seed"]) > 9 and len(found["world_seed"]) == 2
    assert {spec.within for scripts in found.values() for spec in scripts.values()} == {SEEDS}
