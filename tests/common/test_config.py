"""The config system: what people may write on a command line and in YAML, and what they are told when it is wrong.

The classics that these tests guard against: argparse's `type=bool`, for which `--use_moe False` is true; YAML 1.1, for
which `5e-4` is text and `on` is a boolean; and one mistake reported at a time, each after another start of the program.
"""

import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, fields
from pathlib import Path

import pytest

from common.files import ROOT
from common.options import Options, describe, option, parse
from common.values import show
from common.yaml_file import read_yaml
from trainer.stage import StageConfig

STAGES = sorted((ROOT / "trainer").glob("train_*.py"))
SCRIPTS = [path for path in STAGES if "__main__" in path.read_text(encoding="utf-8")]


@dataclass(frozen=True)
class Stage(StageConfig):
    """Options of a stage for these tests."""

    epochs: int = 2
    save_weight: str = "full_sft"
    noise: float = option(0.0, "noise on the embeddings", within="[0, 1)")
    layers: tuple[str, ...] = option((), "names", aliases=("layer_names",))


def read(*argv: str) -> Stage:
    return parse(Stage, list(argv))


@pytest.fixture
def complaints(capsys):
    """parse(...) must fail -> its lines on stderr, without the `error: `."""

    def collect(*argv: str) -> list[str]:
        with pytest.raises(SystemExit) as stop:
            read(*argv)
        assert stop.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith("error: ") for line in lines)
        return [line.removeprefix("error: ") for line in lines]

    return collect


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---- the command line ----


def test_a_stage_restates_a_default_and_inherits_the_rest():
    config = read()
    assert (config.epochs, config.save_weight, config.batch_size) == (2, "full_sft", 32)
    assert read("--num_train_epochs", "5").epochs == 5, "the alias came from the base class"
    with pytest.raises(FrozenInstanceError):
        config.epochs = 3


@pytest.mark.parametrize(
    "words, value",
    [
        ("--use_moe", True),
        ("--use_moe true", True),
        ("--use_moe 1", True),
        ("--use-moe=yes", True),
        ("--use_moe On", True),
        ("--use_moe false", False),
        ("--use_moe False", False),
        ("--use_moe 0", False),
        ("--use_moe=no", False),
        ("", None),
    ],
)
def test_a_boolean_means_what_it_says(words, value):
    assert read(*words.split()).use_moe is value


@pytest.mark.parametrize(
    "words, dtype",
    [
        ("", "auto"),
        ("--dtype float16", "float16"),
        ("--dtype bf16", "bfloat16"),
        ("--fp16", "float16"),
        ("--fp16 true", "float16"),
        ("--bf16=1", "bfloat16"),
        ("--bf16 0", "float32"),
        ("--bf16 0 --fp16 1", "float16"),
        ("--fp16 false --bf16 true", "bfloat16"),
        ("--bf16 0 --dtype float16", "float16"),
    ],
)
def test_bf16_and_fp16_are_ways_to_say_dtype(words, dtype):
    assert read(*words.split()).dtype == dtype


@pytest.mark.parametrize(
    "words, name, value",
    [
        ("--compile", "compile", "on"),
        ("--compile auto", "compile", "auto"),
        ("--use_compile 1", "compile", "on"),
        ("--use_compile 0", "compile", "off"),
        ("--from_resume", "from_resume", "1"),
        ("--from_resume true", "from_resume", "1"),
        ("--resume-from-checkpoint auto", "from_resume", "auto"),
        ("--from_weight Qwen/Qwen2-0.5B", "from_weight", "Qwen/Qwen2-0.5B"),
        ("--from_weight none", "from_weight", None),
        ("--local_rank=1", "local_rank", 1),
        ("--seed 9007199254740993", "seed", 2**53 + 1),
        ("--max_steps 1e3", "max_steps", 1000),
        ("--num_epochs 3.0", "epochs", 3),
        ("--learning_rate 5e-4", "learning_rate", 5e-4),
        ("--batch_size 4 --batch_size 8", "batch_size", 8),
        ("--per-device-train-batch-size 4 --batch_size 4", "batch_size", 4),
        ("--layers q_proj,k_proj v_proj", "layers", ("q_proj", "k_proj", "v_proj")),
    ],
)
def test_other_spellings(words, name, value):
    assert getattr(read(*words.split()), name) == value


def test_all_problems_are_reported_at_once_with_the_nearest_name(complaints):
    lines = complaints(
        *"stray --epochs 0 --learning_rate fast --batchsize 4 --val_fraction=1 --dtype int8 --seed 1.5 "
        "--weight_decay nan --use_wandb maybe --optimizer=sgd --save_weight a/b --warmup_steps 1.5 "
        "--beta 0.1 --save_dir".split()
    )
    expected = """
        --learning_rate fast: expected a number
        --seed 1.5: expected a whole number
        --weight_decay nan: expected a number
        --use_wandb maybe: say true or false (1 or 0, yes or no, on or off)
        --save_dir: needs a value
        stray: unknown option; --help lists them
        --batchsize: unknown option; did you mean batch_size?
        --beta: not for this script; trainer/train_dpo.py knows it
        --val_fraction 1: must be in [0, 1)
        --epochs 0: must be in [1, 1000000]
        --optimizer sgd: choose from adamw, muon
        --dtype int8: choose from auto, float32, bfloat16, float16
        --warmup_steps 1.5: a whole number of steps, or a share below 1
        --save_weight 'a/b': a plain name; --save_dir says where it is written"""
    assert lines == [line.strip() for line in expected.strip().splitlines()]


@pytest.mark.parametrize(
    "words",
    [
        "--epochs 1 --num_epochs 2",
        "--fp16 --bf16",
        "--fp16 --dtype float32",
        "--bf16 0 --dtype bfloat16",
        "--data_path a.jsonl --train_path b.jsonl",
    ],
)
def test_two_spellings_that_disagree_are_a_contradiction_that_names_both(words, complaints):
    flags = [word for word in words.split() if word.startswith("--")]
    (line,) = complaints(*words.split())
    assert all(flag in line for flag in flags) and "different values" in line


def test_another_scripts_option_is_named_with_the_script(complaints):
    """`--teacher` was answered with "did you mean cache_dir?"."""
    words = "--teacher x --tag_weight 3 --vocab_size 300 --temperature 0 --loss_type ipo --ratio 3".split()
    know = {
        "teacher": "trainer/train_distillation.py knows",
        "tag_weight": "trainer/train_distill_reason.py knows",
        "vocab_size": "trainer/train_tokenizer.py knows",
        "ratio": "scripts/prepare_data.py knows",
        "temperature": "trainer/train_distillation.py, eval_model.py know",
        "loss_type": "trainer/train_dpo.py knows",
    }
    lines = complaints(*words)
    assert sorted(lines) == sorted(f"--{name}: not for this script; {scripts} it" for name, scripts in know.items())


def test_what_needs_no_flag_here_is_said_and_passes(capsys):
    assert read("--ddp", "--eval_steps", "50", "--save_total_limit", "3").val_interval == 50
    assert capsys.readouterr().err == "note: --ddp: torchrun says so by itself\n"


def test_an_empty_path_is_not_this_directory(complaints):
    assert complaints("--data_path", "") == ["--data_path: needs a value"]


def test_a_path_that_is_no_text_is_refused_before_anything_is_computed(complaints):
    """Old Chinese archives unpack to names in gbk. A run trained, and its first save ended in a traceback."""
    name = os.fsdecode("数据".encode("gbk"))
    for flags in (("--save_dir", name), ("--data_path", "a.jsonl", f"{name}/b.jsonl"), ("--from_weight", name)):
        assert "bytes that are not UTF-8, and paths are written" in complaints(*flags)[0]


def test_an_abbreviation_is_not_guessed(complaints):
    assert complaints("--epoch", "3") == ["--epoch: unknown option; did you mean epochs?"]


def test_validation_data_comes_from_one_place(complaints):
    (line,) = complaints("--val_path", "v.jsonl", "--val_fraction", "0.1")
    assert line.startswith("--val_path and --val_fraction: both")


def test_only_the_first_rank_complains(complaints, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert complaints("--epochs", "0") == []


def test_paths_are_relative_to_where_they_are_typed_and_defaults_to_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read().save_dir == str(ROOT / "out")
    config = read(
        "--save_dir",
        "../elsewhere",
        "--data_path",
        "a.jsonl:3",
        "b.jsonl",
        "--data-path",
        "c.jsonl",
        "--from_weight",
        "pretrain",
    )
    assert config.save_dir == str(tmp_path.parent / "elsewhere")
    assert config.data_path == tuple(str(tmp_path / name) for name in ("a.jsonl:3", "b.jsonl", "c.jsonl"))
    assert config.from_weight == "pretrain", "a bare name is looked up later, in save_dir"


# ---- YAML ----

MUXUE = """
model:
  base_model_path: "THUDM/chatglm3-6b"
  output_dir: "../model"
  use_8bit: false
  use_4bit: {four_bit}
dataset:
  train_path: "data/train.jsonl"
  val_path: "data/test.jsonl"
  max_length: 2048
training:
  num_epochs: 3
  per_device_train_batch_size: 2
  gradient-accumulation-steps: 8
  learning_rate: 5e-4
  compile: on
lora:
  use_lora: {use_lora}
  r: 8
  lora_alpha: 32
"""


def test_a_nested_file_in_others_words_means_ours_and_the_command_line_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = yaml_file(tmp_path, MUXUE.format(four_bit="false", use_lora="false"))
    config = read("--config", file, "--max_seq_len", "1024", "--epochs=1")
    assert (config.epochs, config.max_seq_len) == (1, 1024), "the command line wins, whichever spelling the file uses"
    assert (config.batch_size, config.accumulation_steps) == (2, 8)
    assert config.learning_rate == 5e-4, "PyYAML reads 5e-4 as text"
    assert config.compile == "on", "YAML 1.1 reads `on` as true"
    assert config.from_weight == "THUDM/chatglm3-6b"
    assert config.data_path == (str(tmp_path / "data/train.jsonl"),)
    assert config.save_dir == str(tmp_path.parent / "model")


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_files_switch_decides_whether_its_lora_section_counts(use_lora, tmp_path, complaints):
    """Full fine-tuning refused such a file, whichever way its switch stood."""
    file = yaml_file(tmp_path, MUXUE.format(four_bit="true", use_lora=str(use_lora).lower()))
    if use_lora:
        assert read("--config", file).bits == 4
    else:
        (line,) = complaints("--config", file)
        assert line.startswith(
            f"{file}: model.use_4bit: weights of 4 bits cannot be trained, only an adapter beside them"
        )
    assert read("--config", file, "--use_4bit=false").trains_adapter == use_lora


def test_what_turns_lora_on():
    assert not read().trains_adapter and read().lora_rank is None
    assert read("--use_lora").lora_rank == 8 and read("--use_lora").trains_adapter
    assert read("--r=4").trains_adapter and not read("--lora_rank=0").trains_adapter
    assert not read("--use_lora=false", "--lora_rank=4", "--lora_name=mine").trains_adapter
    assert read("--use_lora", "--lora_name=mine").save_weight == "mine"
    assert read("--use_lora=false", "--lora_name=mine").save_weight == read().save_weight


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--lora_alpha=8 --lora_name=mine", "--lora_name, --lora_alpha: all weights are trained; for an adapter give"),
        ("--use_lora --lora_rank=0", "--use_lora and --lora_rank 0: an adapter has a rank of at least 1"),
        ("--use_lora --lora_name=a --save_weight=b", "--save_weight and --lora_name: both name what is written"),
        ("--use_lora --lora_name=a/b", "--lora_name 'a/b': a plain name"),
    ],
)
def test_lora_options_that_cannot_be_meant(flags, words, complaints):
    (line,) = complaints(*flags.split())
    assert words in line


def test_problems_in_a_file_name_the_file_and_the_key(tmp_path, complaints):
    file = yaml_file(
        tmp_path,
        "training: {epochs: many, lerning_rate: 1, batch_size: [1, 2]}\n"
        "max_length: 9\nmax_seq_len: 8\nsave_weight: no\nseed: true\nepochs:\n",
    )
    lines = complaints("--config", file)
    assert sorted(lines) == sorted(
        [
            f"{file}: training.epochs many: expected a whole number",
            f"{file}: training.lerning_rate: unknown option; did you mean learning_rate?",
            f"{file}: training.batch_size [1, 2]: expected a single value",
            f"{file}: max_length and {file}: max_seq_len: both set max_seq_len, to different values; give one of them",
            f"{file}: save_weight False: YAML reads this word as true or false; put it in quotes",
            f"{file}: seed True: expected a whole number",
            f"{file}: epochs: needs a value",
        ]
    )


def test_a_value_in_a_file_that_is_not_allowed_names_the_file_and_the_key(tmp_path, complaints):
    """It was said of a flag that nobody had given. What the command line overrides is not said of the file."""
    text = "training: {learning_rate: -1, batch_size: 0, schedule: sine}\nepochs: 0\n"
    file = yaml_file(tmp_path, text + "val_path: a.jsonl\nval_fraction: 0.1\n")
    assert sorted(complaints("--config", file, "--epochs=-2", "--noise=7")) == [
        "--epochs -2: must be in [1, 1000000]",
        "--noise 7: must be in [0, 1)",
        f"{file}: training.batch_size 0: must be at least 1",
        f"{file}: training.learning_rate -1: must be above 0",
        f"{file}: training.schedule sine: choose from cosine, wsd, constant",
        f"{file}: val_path and {file}: val_fraction: both name the validation data; give one of them",
    ]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"a: [1\nb: 2", ":2: "),
        (b"epochs: 3\nx: 1\nepochs: 2", ":3: epochs stands twice"),
        (b"- a\n- b", "expected `key: value` lines"),
        (b"a: \xff\xfe", ": not UTF-8; save it as UTF-8"),
        (None, "No such file"),
    ],
)
def test_an_unreadable_file_is_one_line(tmp_path, complaints, content, reason):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    (line,) = complaints("--config", str(path))
    assert line.startswith(f"--config {path}") and reason in line


def test_an_empty_file_and_a_null_are_fine(tmp_path):
    assert read("--config", yaml_file(tmp_path, "")) == read()
    assert read("--config", yaml_file(tmp_path, "hidden_size: null\nval_path: []\n")) == read()


# ---- what is kept and printed ----


def test_the_config_survives_json_without_what_only_the_launcher_says():
    kept = json.loads(json.dumps(read("--data_path", "a", "--local_rank=1").as_dict()))
    assert kept["data_path"] == [os.path.abspath("a")] and "local_rank" not in kept
    assert kept.keys() == {item.name for item in fields(Stage)} - {"local_rank", "by_recipe"}


def test_a_value_is_shown_as_one_would_type_it():
    """On resume, what had changed was printed as Python's lists and None."""
    typed = [None, ["a.jsonl", "b.jsonl"], ("a", 1), 5e-5, True, 3, "x"]
    assert [show(value) for value in typed] == ["none", "a.jsonl,b.jsonl", "a,1", "5e-05", "true", "3", "x"]


def test_describe_marks_what_is_not_the_default():
    text = describe(read("--batch_size", "4", "--epochs", "2"))
    assert "*batch_size=4" in text and " epochs=2" in text and "local_rank" not in text
    assert text.count("*") == 2, "the legend, and batch_size"


def test_help_prints_our_names_defaults_and_aliases(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parse(Stage, ["--help"], description="What it does, 100% of it.")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "What it does, 100% of it." in text
    assert "--epochs N                    passes over the data [2]; also --num_epochs --num_train_epochs" in text
    assert "where everything is written [out]" in text and "local_rank" not in text
    assert text.index("--noise") < text.index("--epochs"), "the stage's own options come first"
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_of_every_training_script_is_instant(script):
    probe = (
        "import runpy, sys\nsys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "slow = {'torch', 'numpy', 'yaml', 'tokenizers', 'matplotlib', 'tqdm', 'jinja2'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", probe, str(script)], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_any_dataclass_of_options_can_be_parsed():
    @dataclass(frozen=True)
    class Chat(Options):
        temperature: float = option(0.7, "0 takes the likeliest token", within="(-1, 2]", aliases=("temp",))

    assert parse(Chat, ["--temp", "2"]).temperature == 2
    assert Chat(temperature=-1.0).problems() == ["--temperature -1: must be in (-1, 2]"]


def test_yaml_may_merge_what_it_overrides(tmp_path):
    """The key stands once in the file; that a merge brings it along is what merges are for."""
    text = "x: &a {epochs: 1, batch_size: 3}\n"
    tree = read_yaml(yaml_file(tmp_path, text + "b: &b {<<: *a, epochs: 2}\nc: {<<: *b, seed: 1}\n"))
    assert tree["b"] == {"epochs": "2", "batch_size": "3"}
    assert tree["c"] == {"epochs": "2", "batch_size": "3", "seed": "1"}
    assert read_yaml(yaml_file(tmp_path, "")) is None


@pytest.mark.parametrize("word", ["none", "null", "None"])
def test_no_files_is_said_as_no_value_is(word, tmp_path):
    """`val_path: null` over a value from elsewhere was "needs a value", and --val_path none looked for a file none."""
    recipe = yaml_file(tmp_path, "val_path: a.jsonl\n")
    assert read("--config", recipe, "--val_path", word).val_path == ()
    assert read("--config", yaml_file(tmp_path, f"val_path: {word}\n")).val_path == ()


def test_pretraining_leaves_nothing_out(capsys):
    """It cuts a stream into rows, and took --on_long drop without a word."""
    from trainer.train_pretrain import PretrainConfig

    with pytest.raises(SystemExit):
        parse(PretrainConfig, ["--on_long", "drop"])
    assert "--on_long drop: pretraining cuts a stream into rows, nothing is too long" in capsys.readouterr().err
