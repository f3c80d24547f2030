"""The metrics' numbers are those of sacrebleu and rouge_score, and of sums done by hand."""

import math
from decimal import Decimal

import numpy as np
import pytest

from common.console import UserError
from evaluation.metrics import METRICS, chosen, last_number, overlap, same_answer, tokens

ENGLISH = (
    ["The cat sat on the mat today", "hello there, world", "", "a completely different answer"],
    ["the cat sat on a mat today", "hello there world", "not empty", "nothing in common here"],
)
CHINESE = (
    ["今天天气很好，我们去公园。", "北京是中国的首都。", "我不知道。"],
    ["今天天气不错，我们去公园吧。", "中国的首都是北京。", "42"],
)


def counted(name, replies, references):
    return METRICS[name].count(replies, [[text] for text in references])


@pytest.mark.parametrize("replies, references, tokenize", [(*ENGLISH, "13a"), (*CHINESE, "zh")])
def test_bleu_equals_sacrebleus_corpus_score(replies, references, tokenize):
    sacrebleu = pytest.importorskip("sacrebleu")
    rows, how = counted("bleu", replies, references)
    theirs = sacrebleu.corpus_bleu(replies, [references], tokenize=tokenize).score
    assert METRICS["bleu"].value(rows.sum(0)) == pytest.approx(theirs, abs=1e-9) and theirs > 5
    assert how == f"sacrebleu, tokenize={tokenize}"


def test_bleu_with_several_references_is_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    replies, more = ENGLISH[0], ["the cat sat on the mat now", "hello, there world", "", "a different answer"]
    rows, _ = METRICS["bleu"].count(replies, list(zip(ENGLISH[1], more)))
    theirs = sacrebleu.corpus_bleu(replies, [ENGLISH[1], more]).score
    assert METRICS["bleu"].value(rows.sum(0)) == pytest.approx(theirs, abs=1e-9)


def test_bleu_without_four_words_in_a_row_is_smoothed_as_sacrebleu_does():
    sacrebleu = pytest.importorskip("sacrebleu")
    replies, references = ["the cat sat", "on a mat now then"], ["the cat was sitting", "on a mat then now"]
    rows, _ = counted("bleu", replies, references)
    theirs = sacrebleu.corpus_bleu(replies, [references]).score
    assert rows[:, 3].sum() == 0 < METRICS["bleu"].value(rows.sum(0)) == pytest.approx(theirs, abs=1e-9)


def test_the_tokenizer_of_bleu_follows_a_tenth_of_the_references():
    pytest.importorskip("sacrebleu")
    for chinese, expected in ((1, "13a"), (2, "zh")):
        references = ["你好"] * chinese + ["hello"] * (20 - chinese)
        assert counted("bleu", ["hello"] * 20, references)[1] == f"sacrebleu, tokenize={expected}"


def test_the_best_of_several_references_counts():
    for name, score in (("exact", 1), ("f1", 1)):
        rows, _ = METRICS[name].count(["a cat"], [["dog", "cat", "cow"]])
        assert rows.tolist() == [[score, 1]]


def test_less_is_better_of_what_a_text_costs():
    assert [name for name, metric in METRICS.items() if metric.better != 1] == ["ppl", "bpb"]
    assert METRICS["ppl"].better == METRICS["bpb"].better == -1


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_equals_rouge_score(name):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer([name])
    rows, _ = counted(name, *ENGLISH)
    theirs = [scorer.score(reference, reply)[name].fmeasure for reply, reference in zip(*ENGLISH)]
    assert rows[:, 0].tolist() == theirs and METRICS[name].value(rows.sum(0)) == pytest.approx(np.mean(theirs))


def test_rouge_of_the_words_that_jieba_finds():
    """我 爱 北京 天安门 against 我 爱 北京: 3 of 4 words are right, 3 of 3 are found, F = 6/7. Of characters, 4 of
    7 are right, 4 of 4 are found, F = 8/11."""
    pytest.importorskip("jieba")
    said, known = ["我爱北京天安门"], [["我爱北京。"]]
    (words,), how = METRICS["rouge1_jieba"].count(said, known)
    assert words.tolist() == [pytest.approx(6 / 7), 1] and how.endswith("Chinese by jieba's words")
    (characters,), how = METRICS["rouge1"].count(said, known)
    assert characters.tolist() == [pytest.approx(8 / 11), 1] and how.endswith("Chinese by characters")
    assert chosen(["rouge_jieba"]) == ["rouge1_jieba", "rouge2_jieba", "rougeL_jieba"]


def test_rouge_of_chinese_counts_characters():
    """rouge_score alone drops every character that is not a-z or 0-9: of Chinese nothing is left, and all is 0."""
    pytest.importorskip("rouge_score")
    rows, how = counted("rouge1", ["我喜欢猫"], ["我喜欢狗"])
    assert rows.tolist() == [[3 / 4, 1]] and "Chinese by characters" in how


def test_without_the_packages_it_says_what_to_install(monkeypatch):
    """Where the metric is named, before anything is computed. rouge_jieba said it after all answers were there."""
    monkeypatch.setattr("evaluation.metrics.find_spec", lambda name: None)
    for name, install in (("bleu", "sacrebleu"), ("rouge-l", "rouge-score"), ("rouge_jieba", "jieba rouge-score")):
        with pytest.raises(UserError, match=f"^--metrics {name}: .* pip install {install}$"):
            chosen(["f1", name])
    assert chosen(["f1", "ppl"]) == ["f1", "ppl"]


@pytest.mark.parametrize(
    "reply, reference, same",
    [
        ("The answer.", "answer", True),
        ("an answer", "answer", True),
        ("Ｂｅｉｊｉｎｇ", "beijing!", True),
        ("北京。", "北 京", True),
        ("A.", "A", True),  # as "B." is "B", although a letter that is an article goes elsewhere
        ("(a)", "A", True),
        ("The", "A", False),
        ("3.5", "35", False),  # SQuAD's script removes the dot, and takes these for the same
        ("-5", "5", False),
        ("−5", "5", False),  # U+2212, as models write it
        ("x is −5", "x is -5", True),
        ("1,000", "1000", True),
        ("yes, no", "no, yes", False),
        ("🙂", "🙂", True),
        ("🙂", "🙁", False),
        ("", "x", False),
    ],
)
def test_exact(reply, reference, same):
    assert same_answer(reply, reference) is same
    assert counted("exact", [reply], [reference])[0].tolist() == [[same, 1]]


def test_f1_by_hand():
    """6 words and 4, of which 3 are shared, one of them twice in the first text: F1 = 2 x 3 / 10."""
    assert tokens("The cat and the cat saw 2 dogs") == ["cat", "and", "cat", "saw", "2", "dogs"]
    assert overlap("the cat and the cat saw 2 dogs", "one cat saw dogs") == pytest.approx(2 * 3 / 10)
    assert overlap("我喜欢猫", "我爱猫") == pytest.approx(2 * 2 / 7)
    assert overlap("cat cat", "cat cat dog") == pytest.approx(2 * 2 / 5)
    assert overlap("", "cat") == 0 and overlap("", "") == 1


@pytest.mark.parametrize(
    "text, number",
    [
        ("so 48/2 = 24. #### 72", "72"),
        ("#### 1,234 eggs, not 7", "1234"),
        ("She pays $18.50.", "18.50"),
        ("x = -3", "-3"),
        ("10-5", "5"),
        ("x = −3", "-3"),  # U+2212
        ("a loss: -$1,200", "-1200"),
        ("from $3 to $5", "5"),
        ("$10-$4", "4"),
        ("共有１，２３４个", "1234"),
        ("no number", None),
        ("#### none", None),
        ("7 #### none", "7"),
        ("#### 3, no: #### 4", "4"),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_numbers_count_only_where_the_reference_has_one():
    rows, how = counted("number", ["18.0", "it is 3", "4", "?"], ["#### 18", "3", "nothing", "5"])
    assert rows.tolist() == [[1, 1], [1, 1], [0, 0], [0, 1]] and "1 references have none" in how
    assert METRICS["number"].value(rows.sum(0)) == pytest.approx(2 / 3)


def test_nothing_to_divide_by_is_nan_and_not_an_error():
    for name, metric in METRICS.items():
        width = {"likelihood": 3}.get(metric.of, 10 if name == "bleu" else 2)
        if name != "bleu" or pytest.importorskip("sacrebleu"):
            assert math.isnan(metric.value(np.zeros(width)))


def test_names():
    assert chosen(["BLEU", "ROUGE", "Perplexity", "rouge-l"]) == ["bleu", "rouge1", "rouge2", "rougeL", "ppl"]
    with pytest.raises(UserError, match="--metrics blue: choose from ppl, bpb, bleu.* rouge, rouge_jieba"):
        chosen(["blue"])
    with pytest.raises(UserError, match="compare_models"):
        chosen(["Human Evaluation"])
