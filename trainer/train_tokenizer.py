"""Train a byte-level BPE tokenizer on files of rows or text, and measure how many characters its tokens hold.

    python trainer/train_tokenizer.py --vocab_size 2000                  # on the tiny world: half a minute on a CPU
    python trainer/train_tokenizer.py --data_path dataset/pretrain_hq.jsonl dataset/sft_mini_512.jsonl:4 --holdout 10

All text of a row is used, whatever the row's layout. FILE:3 counts a file three times, FILE:0.1 takes a tenth of its
rows. `--holdout 10` leaves out every tenth row (by its hash) and measures on these rows only. The shipped tokenizer/
was made by this script; docs/tokenizer.md has the command and explains the choices.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hashlib
import json
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from common.console import UserError, check_writable, cut, run, say, width_of
from common.files import ROOT, atomic_file, atomic_folder, hash_file, remove_folder
from common.options import Options, option, parse
from common.values import MOST_TIMES

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
MARKUP = tuple(f"<{slash}{name}>" for name in ("think", "answer", "tool_call", "tool_response") for slash in ("", "/"))
SPARE = tuple(f"<|spare_{n}|>" for n in range(5))  # for control tokens added later, without a new vocabulary
FILES = ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json")
SMALLEST = len(SPECIAL + MARKUP + SPARE) + 256
LARGEST = 10_000_000  # the trainer takes memory for all of them before it begins

# Qwen2's (huggingface.co/Qwen/Qwen2-0.5B, tokenizer.json); llama.cpp calls it "qwen2". Every digit is one token
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UNSPACED = r"[^\r\n\p{L}\p{N}]?[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]{1,16}"
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
NO_CONTENT = ("from", "type", "id")  # keys whose values belong to the file format, and are no text


@dataclass(frozen=True)
class TokenizerConfig(Options):
    data_path: tuple[str, ...] = option(
        (),
        "training files, .jsonl .json .txt; FILE:3 counts one three times (default: the tiny world)",
        path=True,
        aliases=("data_file", "train_path"),
    )
    save_dir: str = option(str(ROOT / "out" / "tokenizer"), "where it is written", aliases=("output_dir",), path=True)
    vocab_size: int = option(
        6400, "number of tokens, with the control tokens and the 256 bytes", within=f"[{SMALLEST}, {LARGEST}]"
    )
    holdout: int = option(
        0, "leave every Nth row out of training, and measure on these rows (0: none)", within="[0, inf)"
    )
    chinese_weight: float = option(1.0, "count a row in Chinese so many times", within=f"(0, {MOST_TIMES}]")
    sample_mb: float = option(
        32.0, "train on a sample of about so many MB; 32 MB of Chinese need 2 GB of memory", within="(0, inf)"
    )


def train_bpe(texts: Iterator[str], vocab_size: int):
    """A `tokenizers.Tokenizer`, the same for the same texts. Unlike tokenizer/text.py, it finds control tokens in text.

    The trainer keeps every distinct word, and goes through the whole word for each merge in it. WORDS takes a clause of
    Chinese for one word, even a novel without punctuation. So in training, such text is cut into runs of 16 characters;
    a punctuation mark before a clause stays with it, because "，我" is worth a token. Few runs occur twice, though, so
    memory grows by 200 bytes a Chinese character (100 GB for 1.5 GB, huggingface/tokenizers#1795): hence `--sample_mb`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    runs = pre_tokenizers.Split(Regex(UNSPACED), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, runs, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL + MARKUP + SPARE),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    # Python would notice a Ctrl-C only after the whole training. Where it is ignored, it stays so.
    raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if raises:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        tokenizer.train_from_iterator(texts, trainer)
    finally:
        if raises:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:  # markup is not "special", as in Qwen3: others leave special tokens out of text
        token["special"] = token["content"] not in MARKUP
    return Tokenizer.from_str(json.dumps(spec))


def save(tokenizer, directory: str | Path) -> None:
    """Writes tokenizer.json, and beside it the shipped chat template and configuration: there is only one chat format.

    Another tokenizer that is there is kept beside the directory, where `tokenizer_of` finds it for its weights.
    """
    from tokenizer.find import backup_path
    from tokenizer.text import SHIPPED, Tokenizer

    directory = Path(directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    text = tokenizer.to_str(pretty=True) + "\n"
    former, kept = directory / "tokenizer.json", None
    if former.is_file() and directory != SHIPPED:
        try:
            kept = backup_path(directory, known := Tokenizer.load(directory).hash)
        except ValueError:  # of another kind
            kept = backup_path(directory, known := hash_file(former))
        if not kept.is_dir():
            with atomic_folder(kept) as folder:
                for name in FILES:
                    if (directory / name).is_file():
                        shutil.copyfile(directory / name, folder / name)
    with atomic_file(former) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    if directory != SHIPPED:
        for name in FILES[1:]:
            with atomic_file(directory / name) as temporary:
                shutil.copyfile(SHIPPED / name, temporary)
    if kept and Tokenizer.load(directory).hash == known:  # the same again
        remove_folder(kept)
    elif kept:
        say(f"the tokenizer that was in {directory} is now in {kept}, for the weights that were trained with it")


class Corpus:
    """Rows of weighted files. A row's hash decides whether and how often it is used, whatever the order of the rows."""

    def __init__(self, config: TokenizerConfig):
        from dataset.read.jsonl import Jsonl
        from dataset.read.text import TextFile
        from dataset.tiny_world.files import generate
        from dataset.tokens.order import weighted

        specs = config.data_path or generate(ROOT / "out" / "tiny_world").values()
        pairs = [weighted(spec) for spec in specs]
        self.config = config
        self.files = [((TextFile if path.suffix.lower() == ".txt" else Jsonl)(path), weight) for path, weight in pairs]
        size = sum(file.size * min(weight, 1) for file, weight in self.files)  # a row counted twice is stored once
        self.share = min(1.0, config.sample_mb * 1e6 / size)
        self.used: Counter[str] = Counter()

    def training_texts(self) -> Iterator[str]:
        for file, weight in self.files:
            for texts, number in self._rows(file):
                if self._held_out(number):
                    continue
                language = language_of(texts)
                times = weight * self.share * (self.config.chinese_weight if language == "zh" else 1)
                for _ in range(int(times + (number >> 32) / 2**32)):  # 2.3: three times for three rows in ten
                    for _, text in texts:
                        self.used[language] += len(text)
                        yield text

    def measured_texts(self) -> Iterator[tuple[str, str]]:
        """("file kind language", text) of the rows held out; without `--holdout`, of every tenth row."""
        for file, _ in self.files:
            for texts, number in self._rows(file):
                if self._held_out(number) or not self.config.holdout and number % 10 == 0:
                    for kind, text in texts:
                        if kind != "role":
                            yield f"{file.path.parent.name}/{file.path.name} {kind} {language_of(texts)}", text

    def _held_out(self, number: int) -> bool:
        return bool(self.config.holdout) and number % 2**32 % self.config.holdout == 0

    def _rows(self, file) -> Iterator[tuple[list[tuple[str, str]], int]]:
        from dataset.read.jsonl import Jsonl
        from dataset.read.parse import decode, parse_row

        for chunk in file.chunks(1 << 16):
            for raw, line in zip(chunk.rows, chunk.lines):
                digest = hashlib.sha256(raw).digest()
                number = int.from_bytes(digest[4:8] + digest[:4], "big")  # low half: held out? high half: how often
                try:
                    texts = list(contents(parse_row(raw))) if isinstance(file, Jsonl) else [("text", decode(raw))]
                except ValueError as error:
                    raise UserError(f"{file.path}:{line}: {error}") from None
                yield texts, number


def contents(value, kind: str = "text") -> Iterator[tuple[str, str]]:
    """(kind, text) of every text in a row. Roles too: the model reads one at the start of every turn."""
    if isinstance(value, str):
        yield kind, value
    elif isinstance(value, dict):
        if value.get("role") == "assistant" or value.get("from") in ("assistant", "gpt"):
            kind = "answers"
        for key, item in value.items():
            if key not in NO_CONTENT:
                yield from contents(item, "role" if key == "role" else kind)
    elif isinstance(value, list):
        for item in value:
            yield from contents(item, kind)


def language_of(texts: list[tuple[str, str]]) -> str:
    """ "zh" if at least a fifth of the characters are Chinese, else "en"."""
    row = "".join(text for kind, text in texts if kind != "role")
    return "zh" if len(HAN.findall(row)) * 5 >= max(len(row), 1) else "en"


def report(corpus: Corpus, directory: str | Path) -> str:
    """A table of characters and bytes per token, by file and language. Checks that decoding gives each text back."""
    from tokenizer.text import Tokenizer

    tokenizer, sums = Tokenizer.load(directory), Counter()
    rows = corpus.measured_texts()
    while batch := [row for row, _ in zip(rows, range(1000))]:
        for (place, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch])):
            assert tokenizer.decode(ids) == text
            counts = {"characters": len(text), "bytes": len(text.encode()), "tokens": len(ids)}
            sums.update({(place, unit): count for unit, count in counts.items()})
    lines = [f"{'':46}characters/token  bytes/token     tokens"]
    for place in sorted({place for place, _ in sums}):
        characters, size, tokens = (sums[place, unit] for unit in ("characters", "bytes", "tokens"))
        if tokens:
            name = cut(place, 46)
            name += " " * (46 - width_of(name))
            lines.append(f"{name}{characters / tokens:16.3f}{size / tokens:13.3f}{tokens:11,}")
    return "\n".join(lines)


def main() -> None:
    config = parse(TokenizerConfig, description=__doc__)
    check_writable(config.save_dir)
    corpus = Corpus(config)
    say(f"{len(corpus.files)} files" + (f", a sample: {corpus.share:.1%} of their rows" if corpus.share < 1 else ""))
    tokenizer = train_bpe(corpus.training_texts(), config.vocab_size)
    if not corpus.used.total():
        raise UserError(
            "no text to train on: the rows have none, or none of them are left by --sample_mb "
            f"{config.sample_mb:g}, --holdout {config.holdout} and the weights"
        )
    chinese = f"{corpus.used['zh']:,} of them in rows that are at least a fifth Chinese"
    say(f"trained on {sum(corpus.used.values()):,} characters ({chinese})")
    save(tokenizer, config.save_dir)
    say(report(corpus, config.save_dir))
    if (entries := tokenizer.get_vocab_size()) < config.vocab_size:
        say(
            f"warning: --vocab_size {config.vocab_size:,} asks for more entries than this text gives: {entries:,}. No "
            "further pair of tokens occurs twice; give more text"
        )
    say(f"saved to {config.save_dir}, {tokenizer.get_vocab_size():,} entries")


if __name__ == "__main__":
    run(main)
