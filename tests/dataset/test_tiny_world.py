"""The tiny world's exam must not be passable by a trick: these tests hold the generated files to docs/tiny_world.md.

Each rule is checked on the text of the files, never on the generator's own bookkeeping alone: what the exam asks is
searched for in pretrain.jsonl and sft.jsonl as a cheater would.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict

import pytest

import dataset.tiny_world.talk as talk
import dataset.tiny_world.words as text
from dataset.tiny_world.exam import (
    EXAM_SIZE,
    Question,
    draw_questions,
    grade,
    most_frequent_baseline,
    nearest_row_baseline,
    normalise,
    report,
    scores,
    sft_pairs,
)
from dataset.tiny_world.files import generate
from dataset.tiny_world.rows import FILES, lines
from dataset.tiny_world.world import KINDS, LARGEST, LATER, Dice, World


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("tiny_world"), seed=0, files=tuple(FILES))


@pytest.fixture(scope="module")
def pretrain(paths) -> list[str]:
    return [json.loads(line)["text"] for line in paths["pretrain"].read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def sft(paths) -> list[str]:
    """Each conversation as one text."""
    rows = [json.loads(line)["conversations"] for line in paths["sft"].read_text("utf-8").splitlines()]
    return ["\n".join(turn["content"] for turn in row) for row in rows]


@pytest.fixture(scope="module")
def later(paths) -> dict[str, list[str]]:
    """The files of the stages after SFT, each row as one text."""
    said = {}
    for name in ("lora_identity", "dpo", "reason"):
        rows = [json.loads(line) for line in paths[name].read_text("utf-8").splitlines()]
        said[name] = ["\n".join(turn["content"] for turns in row.values() for turn in turns) for row in rows]
    return said


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return draw_questions(seed=0)


# ---- the same bytes everywhere ----


def test_files_are_the_same_byte_for_byte_everywhere(paths):
    """A change of these hashes is a new world: raise VERSION with it, or old files will be taken for the new ones."""
    found = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in paths.items()}
    assert found == {
        "pretrain": "769a4e2d4aa8c733",
        "sft": "ccb09a851fa572a2",
        "lora_identity": "2193e0071d55bd23",
        "dpo": "3d9399ed4c4d59ad",
        "dpo_val": "738774b4538bbd11",
        "reason": "2c677c84927f9fbb",
    }
    drawn = hashlib.sha256(repr(draw_questions(seed=0)).encode()).hexdigest()[:16]
    assert drawn == "0f1361e6ac6537c9"


def test_dice_are_the_documented_sequence():
    """random.Random("text").random() is the one sequence Python promises; the draws are worked out by hand from it."""
    import random

    expected = random.Random("a 1").random()
    assert Dice("a", 1).below(1000) == int(expected * 1000)
    assert sorted(Dice("a", 1).shuffled(range(9))) == list(range(9))


def test_generate_keeps_what_is_there_and_repairs_what_is_not(tmp_path):
    first = generate(tmp_path, seed=3, files=("sft",))["sft"]
    data, time = first.read_bytes(), first.stat().st_mtime_ns
    assert generate(tmp_path, seed=3, files=("sft",))["sft"].stat().st_mtime_ns == time
    first.write_bytes(data[:1000])  # a file cut short by a full disk
    generate(tmp_path, seed=3, files=("sft",))
    assert first.read_bytes() == data
    first.with_suffix(".stamp.json").write_text("[")
    generate(tmp_path, seed=4, files=("sft",))
    assert first.read_bytes() != data
    with pytest.raises(ValueError, match="no file 'dp0'"):
        generate(tmp_path, files=("dp0",))


# ---- facts ----


def test_world_is_large_enough(world):
    assert len(text.PEOPLE) >= 40 and len(text.RELATIONS) == 5
    for language in text.LANGUAGES:
        for relation in text.RELATIONS:
            assert len(set(text.QUESTIONS[language][relation])) == 10
            assert len(text.STATEMENTS[language][relation]) >= 4
    assert all(len(values) >= 12 for values in text.VALUES.values())
    every_word = [word for table in (text.PEOPLE, *text.VALUES.values()) for pair in table for word in pair]
    assert len(set(every_word)) == len(every_word), "two things share a name"
    names_and_values = [word for word in every_word if not re.fullmatch(r"\d+月", word)]
    clashes = [(a, b) for a in names_and_values for b in names_and_values if a != b and re.search(rf"\b{a}\b", b)]
    assert not clashes, "searching for one would find the other"


def mentions(word: str, line: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", line) is not None


def test_exam_facts_never_occur_in_sft(world, sft, later):
    """No row of SFT or of a later stage has the person together with the value of a held-out relation, in either
    language or across both."""
    held = defaultdict(list)
    for person, relation in world.exam_facts:
        for name in text.PEOPLE[person]:
            held[name] += [word for word in text.VALUES[relation][world.facts[person, relation]]]
    everyone = re.compile("|".join(sorted(held)))
    for row in (*sft, *(row for rows in later.values() for row in rows)):
        for name in set(everyone.findall(row)):
            assert not [value for value in held[name] if mentions(value, row)], row


def test_exam_facts_are_never_asked_before_the_exam(world, pretrain, sft):
    """Nor does any file put the question: pretraining states such a fact, it does not show how it is asked."""
    forbidden = set()
    for person, relation in world.exam_facts:
        for side, language in enumerate(text.LANGUAGES):
            name = text.PEOPLE[person][side]
            forbidden |= {question.format(n=name) for question in text.QUESTIONS[language][relation]}
    asked = {line for row in (*pretrain, *sft) for line in row.splitlines()}
    assert any(question.endswith("？") for question in asked) and not forbidden & asked


def test_every_exam_fact_is_stated_in_pretraining_in_every_wording(world, pretrain):
    stated = Counter(line for row in pretrain for line in row.splitlines())
    for person, relation in world.exam_facts:
        for language in text.LANGUAGES:
            slots = world.fact(person, relation, language)
            times = [stated[lines([wording.format(**slots)])] for wording in text.STATEMENTS[language][relation]]
            assert min(times) >= 3 and sum(times) >= 40, (slots, times)


def test_everyone_is_asked_about_in_sft(world):
    """So that who somebody is can be learnt there; what is held out is spread evenly over people and relations."""
    per_person = Counter(person for person, _ in world.exam_facts)
    per_relation = Counter(relation for _, relation in world.exam_facts)
    assert set(per_person.values()) == {2} and len(per_person) == len(text.PEOPLE)
    assert max(per_relation.values()) - min(per_relation.values()) <= 1


def test_two_wordings_of_each_question_are_for_the_exam_only(questions, pretrain, sft):
    def pattern(wording):
        return re.compile(re.escape(wording).replace(r"\{n\}", r"[^\s，。？?.]{2,8}?"))

    whole, asked = "\n".join(pretrain + sft), [q for q in questions if q.kind == "fact"]
    new = 0
    for language in text.LANGUAGES:
        for wordings in text.QUESTIONS[language].values():
            assert all(pattern(wording).search(whole) for wording in wordings[: -text.EXAM_WORDINGS])
            for wording in wordings[-text.EXAM_WORDINGS :]:
                assert not pattern(wording).search(whole), wording
                new += sum(pattern(wording).fullmatch(q.prompt) is not None for q in asked)
    assert 0.4 < new / len(asked) < 0.6  # half of the exam's questions


# ---- the other kinds ----


def test_exam_passages_are_about_people_seen_nowhere(world, questions, pretrain, sft):
    whole = "\n".join({line for row in (*pretrain, *sft) for line in row.splitlines()})
    words = re.findall("[A-Za-z]+", whole)
    seen = {"en": {f"{a} {b}" for a, b in zip(words, words[1:])}, "zh": {a + b for a, b in zip(whole, whole[1:])}}
    for language in text.LANGUAGES:
        assert len(world.exam_names[language]) >= 100 and len(seen[language]) > 1000
        assert not set(world.exam_names[language]) & seen[language]
    for question in questions:
        if question.kind == "reading":
            assert any(name in question.prompt for name in world.exam_names[question.language])


def test_exam_sums_use_pairs_of_numbers_never_combined(world, questions, pretrain, sft, later):
    """Every answer writes its equation, so every combination a file makes, word problems included, can be found. Nor
    does a file say it backwards: 21-9=12 tells what 12+9 is."""
    written = (*pretrain, *sft, *later["reason"])
    equations = [found for row in written for found in re.findall(r"(\d+)([+-])(\d+)=(\d+)", row)]
    combined = {tuple(sorted((int(a), int(b)))) for a, _, b, _ in equations}
    small = {pair for pair in combined if min(pair) >= 2 and max(pair) <= LARGEST}
    assert len(small) + len(world.exam_pairs) >= 185, "of the 190 pairs of 2..20, all but a few occur"
    assert not combined & world.exam_pairs
    backwards = {tuple(sorted((int(number), int(c)))) for a, _, b, c in equations for number in (a, b)}
    assert not backwards & world.exam_pairs
    for question in questions:
        if question.kind in ("sum", "calendar"):
            a, sign, b, result = re.match(r"(\d+)([+-])(\d+)=(\d+)", question.answer).groups()
            assert tuple(sorted((int(a), int(b)))) in world.exam_pairs
            equations.append((a, sign, b, result))
    assert all(int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) > 0 for a, sign, b, c in equations)


def test_questions_and_their_equations_use_the_same_numbers(paths):
    """Which is what makes the search above complete: no sum hides in a question whose answer shows another one."""
    checked = 0
    for prompt, reply in sft_pairs(paths["sft"]):
        if equation := re.match(r"(\d+)[+-](\d+)=\d+", reply):
            asked = re.findall(r"\d+", re.sub(r"\d+月", "", prompt))
            assert sorted(asked) == sorted(equation.groups()), (prompt, reply)
            checked += 1
    assert checked > 3000


def test_dates_stay_in_their_month(questions):
    for question in questions:
        if question.kind == "calendar":
            month, day = re.search(r"(\d+月|[A-Z][a-z]+ (?=\d+\.$))(\d+)", question.answer.split("=")[1]).groups()
            assert month in question.prompt and 1 <= int(day) <= 29 and f"={day}" in question.answer


def test_exam_lists_and_phrases_are_new(questions, pretrain, sft):
    neighbours = set()
    for row in {*pretrain, *sft}:
        for items in (re.split("\n|, |: |[.]", part) for part in re.split("：\n", row)):
            neighbours |= set(zip(items, items[1:])) | set(zip(items[1:], items))
    assert len(neighbours) > 1000
    whole = "\n".join(pretrain + sft)
    for question in questions:
        if question.kind == "list":
            listed = re.search("(?s)：\n(.*)\n|: (.*?)[.]\n", question.prompt)
            items = re.split("\n|, ", listed.group(1) or listed.group(2))
            assert len(items) >= 3 and set(zip(items, items[1:])) - neighbours, question
        if question.kind == "translation":
            phrase = re.search('[“"](.*?)[”"]', question.prompt).group(1)
            assert phrase not in whole and question.answer not in whole, question


# ---- what the later stages change ----


def test_problems_of_the_exam_are_new_chains_of_known_steps(world, sft, later):
    """A chain that the exam asks occurs nowhere, but each of its steps is one that training may take."""
    seen = {chain for row in (*sft, *later["reason"]) for chain in re.findall(r"\d+(?:[+-]\d+){2,}", row)}
    assert len(seen) > 1000
    for question in draw_questions(seed=0, kinds=("steps",)):
        numbers = [int(n) for n in re.findall(r"\d+", question.prompt)]
        if chain := re.search(r"\d+(?:[+-]\d+){2,}", question.prompt):
            assert chain[0] not in seen
            assert eval(chain[0]) == int(question.answer)  # noqa: S307 (digits and signs only)
        assert not any(world.is_exam_pair(a, b) for a, b in zip(numbers, numbers[1:]))


def test_every_thought_is_the_right_calculation(paths):
    """Each line continues the one before, and the last one ends in the answer."""
    checked = 0
    for line in paths["reason"].read_text("utf-8").splitlines():
        for turn in json.loads(line)["conversations"]:
            if thought := re.fullmatch(r"<think>\n((?s:.*))\n</think>\n<answer>(\d+)</answer>", turn["content"]):
                steps = [re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", step).groups() for step in thought[1].split("\n")]
                assert all(int(c) == int(a) + int(sign + b) for a, sign, b, c in steps)
                assert [step[3] for step in steps[:-1]] == [step[0] for step in steps[1:]]
                assert steps[-1][3] == thought[2]
                checked += 1
    assert checked == 2400


def test_identity_is_asked_in_wordings_that_are_not_trained_on(later):
    trained = {row.split("\n")[0] for row in later["lora_identity"]}
    questions = draw_questions(seed=0, kinds=("identity",))
    assert len(questions) == 40 and not {q.prompt for q in questions} & trained
    for language in text.LANGUAGES:
        for known, _, answer in talk.IDENTITY[language]:
            assert all(later["lora_identity"].count(f"{question}\n{answer}") == 3 for question in known)
        old, new = talk.NAMES[language]  # of small talk. A greeting used to be answered with the old name
        assert any(new in row for row in later["lora_identity"])
        assert not any(old in row for row in later["lora_identity"])


def test_preferences_differ_in_manner_only(paths):
    """Where somebody is asked about, kind is chosen and curt rejected; anything else is answered plainly, and kind is
    rejected. The facts are the same. Half of the others ask for a fact about a person. Without those, and with
    rejected answers that said nothing, a model learned to be kind to every question that names a person: of the exam's
    facts in Chinese it knew 12 % after DPO instead of 89 %. The held-out pairs are about people nobody was asked to
    describe."""
    described, asks_for_fact = {"dpo": set(), "dpo_val": set()}, 0
    for name, people in described.items():
        for number, line in enumerate(paths[name].read_text("utf-8").splitlines()):
            row = json.loads(line)
            (question, chosen), (same, rejected) = ([t["content"] for t in row[k]] for k in ("chosen", "rejected"))
            assert question == same
            wants_kind = number % 4 < 2
            words = talk.ABOUT[text.LANGUAGES[number % 2]]
            opening, closing = words["kind"].split("{s}")
            manner = Question("manner", text.LANGUAGES[number % 2], question, words["kind"].format(s="…"))
            assert grade(manner, chosen) == wants_kind == (not rejected.startswith(opening))
            if wants_kind:
                facts = chosen.removeprefix(opening).removesuffix(closing)
                assert rejected == words["curt"].format(s=facts)
                people |= {i for i, names in enumerate(text.PEOPLE) if any(n in question for n in names)}
            else:
                assert opening not in chosen and rejected == words["kind"].format(s=chosen)
                names_somebody = any(n in question for names in text.PEOPLE for n in names)
                asks_for_fact += names_somebody and "\n" not in question
    assert asks_for_fact > (400 + 60) / 2
    assert len(described["dpo_val"]) == 12 and not described["dpo"] & described["dpo_val"]


# ---- what the exam is worth ----


def test_exam_is_balanced_and_another_question_seed_draws_anew(questions):
    assert set(EXAM_SIZE) == {*KINDS, *LATER}
    count = Counter((q.kind, q.language) for q in questions)
    assert all(count[kind, language] == EXAM_SIZE[kind] for kind in KINDS for language in text.LANGUAGES)
    assert len({q.prompt for q in questions}) == len(questions) == 600
    again, other = draw_questions(seed=0), draw_questions(seed=0, question_seed=1)
    assert again == questions and len(other) == len(questions)
    assert len({q.prompt for q in other} & {q.prompt for q in questions}) < 0.3 * len(questions)
    known = {q.prompt: q.answer for q in questions}
    assert all(known.get(q.prompt, q.answer) == q.answer for q in other), "one world, one answer"


def test_baselines_are_under_the_bars(paths, questions):
    nearest, frequent = nearest_row_baseline(questions, paths["sft"]), most_frequent_baseline(questions)
    for kind in (*KINDS, "all"):
        assert sum(nearest[kind, language] for language in text.LANGUAGES) / 2 <= 0.20, (kind, nearest)
        assert sum(frequent[kind, language] for language in text.LANGUAGES) / 2 <= 0.10, (kind, frequent)


def test_nearest_row_baseline_finds_a_row_that_is_there(paths):
    """The baseline is a real copier: asked a question that SFT holds, it gives that row's reply."""
    prompt, reply = next(pair for pair in sft_pairs(paths["sft"]) if "\n" in pair[0])
    table = report([Question("reading", "zh", prompt, reply)], ["?"], paths["sft"])
    assert "0.0%" in table and table.splitlines()[0].split()[-4:] == ["nearest", "row", "most", "frequent"]
    assert nearest_row_baseline([Question("reading", "zh", prompt, reply)], paths["sft"])["all", "zh"] == 1.0


def test_guessing_a_value_in_the_right_sentence_is_worth_little(world):
    """Whoever knows every wording and name but no fact of the exam can only guess at a value."""
    for relation in text.RELATIONS:
        held = Counter(world.facts[key] for key in world.exam_facts if key[1] == relation)
        assert max(held.values()) / sum(held.values()) < 0.25, relation
    best = sum(
        max(Counter(world.facts[key] for key in world.exam_facts if key[1] == relation).values())
        for relation in text.RELATIONS
    )
    assert best / len(world.exam_facts) <= 0.20


# ---- grading ----


@pytest.mark.parametrize(
    "answer, reply, right",
    [
        ("Mira lives in Moonport.", "Mira lives in Moonport", True),
        ("Mira lives in Moonport.", " Mira  lives in Moonport.\n", True),
        ("Mira lives in Moonport.", "Mira lives in Moonport. Mira lives in Stonebridge.", False),
        ("Mira lives in Moonport.", "Moonport", False),
        ("Mira lives in Moonport.", "mira lives in moonport.", False),
        ("米拉住在月港。", "米拉 住在 月港", True),
        ("米拉住在月港。", "米拉住在月港、石桥镇。", False),
        ("12+9=21", "１２ + ９ = ２１。", True),
        ("12+9=21", "12+9=21 12+9=22", False),
        ("12+9=21", "12+9=2", False),
        ("two cats", "twocats", False),
        ("Backwards: hat, cup, key.", "Backwards: hat,cup,key.", True),
        ("two cats", "", False),
    ],
)
def test_grade_wants_the_answer_and_nothing_else(answer, reply, right):
    assert grade(Question("fact", "en", "?", answer), reply) is right


def test_normalise_is_idempotent():
    for answer in ("12 + 9 = 21。", "Mira  lives in　Moonport !", "倒过来是：帽子、 杯子。"):
        assert normalise(normalise(answer)) == normalise(answer)


def test_report_shows_scores_beside_baselines(questions, paths):
    right = [q.answer for q in questions]
    half = [q.answer if q.language == "zh" else "?" for q in questions]
    assert set(scores(questions, right).values()) == {1.0}
    assert scores(questions, half)["all", "zh"] == 1.0 and scores(questions, half)["all", "en"] == 0.0
    table = report(questions, half)
    assert "most frequent" in table.splitlines()[0] and "nearest row" not in table
    assert len(table.splitlines()) == 1 + 2 * (len(KINDS) + 1)
    with pytest.raises(ValueError, match="1 replies to 600 questions"):
        scores(questions, ["?"])


def test_other_seeds_are_other_worlds():
    assert World(1).facts != World(0).facts and World(1).exam_pairs != World(0).exam_pairs
    assert not {q.prompt for q in draw_questions(1) if q.kind == "reading"} & {q.prompt for q in draw_questions(0)}
