"""The tiny world: a small invented world in Chinese and English, generated, with an exam whose answers are known.

    python dataset/tiny_world --seed 0 --save_dir out/tiny_world     # its six files, a few seconds

Its point is measurement: because we know every answer, the effect of each training stage can be read off an exam that
no trick passes. What the exam asks is kept apart from what is trained on, once, in `World.__init__`:
    fact          two of the five relations of every person are stated in pretraining and never occur in SFT
    reading       the people in a passage bear names that no training file contains
    sum calendar  pairs of numbers of which no training file has both in one equation
    list          every list has neighbours that no training file puts side by side
    translation   pairs of words (colour and animal, number and animal) that no training file combines
docs/tiny_world.md explains the rules; tests/dataset/test_tiny_world.py holds the files to them; the words are in
words.py, the files in rows.py, the questions in exam.py.
"""

from __future__ import annotations

import random
from itertools import combinations

import dataset.tiny_world.talk as talk
import dataset.tiny_world.words as text

KINDS = ("fact", "reading", "sum", "calendar", "list", "translation")
LATER = ("steps", "identity", "manner")  # what the stages after SFT change
LARGEST = 20  # operands of sums and differences: 2..LARGEST
HELD_OUT = 0.12  # share of the number pairs and of the translation pairs that only the exam combines
HELD_RELATIONS = 2  # of the five relations of each person, how many only pretraining states
THINGS = [*text.THINGS, *text.ANIMALS, *text.VALUES["food"]]


class Dice:
    """Seeded choices from random.Random.random() alone, the one method whose sequence Python promises to keep."""

    def __init__(self, *seed):
        self.random = random.Random(" ".join(map(str, seed))).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def chance(self, p: float) -> bool:
        return self.random() < p

    def pick(self, items):
        return items[self.below(len(items))]

    def shuffled(self, items) -> list:
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items

    def some(self, items, count: int) -> list:
        """`count` different ones, or all if there are fewer, in any order."""
        picked: list[int] = []
        while len(picked) < min(count, len(items)):
            if (i := self.below(len(items))) not in picked:
                picked.append(i)
        return [items[i] for i in picked]


class World:
    """Who lives where, and which part of everything belongs to the exam."""

    kinds = (*KINDS, "steps")  # what follow-up questions are drawn from

    def __init__(self, seed: int = 0):
        dice = Dice("world", seed)
        people = range(len(text.PEOPLE))
        self.facts: dict[tuple[int, str], int] = {}  # (person, relation) -> index into text.VALUES[relation]
        for relation, values in text.VALUES.items():
            owners = dice.shuffled(people)
            self.facts.update({(person, relation): i % len(values) for i, person in enumerate(owners)})
        held = [text.RELATIONS[(person + j * 2) % 5] for person in people for j in range(HELD_RELATIONS)]
        order = dice.shuffled(people)  # the pattern above holds out every relation equally often
        self.exam_facts = {(order[i // HELD_RELATIONS], relation) for i, relation in enumerate(held)}
        pairs = [(a, b) for a in range(2, LARGEST + 1) for b in range(a, LARGEST + 1)]
        self.exam_pairs = set(dice.shuffled(pairs)[: int(HELD_OUT * len(pairs))])  # unordered: (smaller, larger)
        words = [
            (kind, i, j)
            for kind, table in (("colour", text.COLOURS), ("number", text.NUMBERS))
            for i in range(len(table))
            for j in range(len(text.ANIMALS))
        ]
        self.exam_words = set(dice.shuffled(words)[: int(HELD_OUT * len(words))])
        self.names, self.exam_names = {}, {}
        for language in text.LANGUAGES:
            first, second = text.NAME_PARTS[language]
            names = dice.shuffled(("" if language == "zh" else " ").join((a, b)) for a in first for b in second)
            cut = len(names) // 5
            self.exam_names[language], self.names[language] = names[:cut], names[cut:]

    def is_exam_pair(self, a: int, b: int) -> bool:
        return (min(a, b), max(a, b)) in self.exam_pairs

    def tells_exam_pair(self, a: int, b: int, result: int) -> bool:
        """Whether two of the three numbers of an equation are a pair that only the exam combines."""
        return any(self.is_exam_pair(*pair) for pair in combinations((a, b, result), 2))

    def fact(self, person: int, relation: str, language: str) -> dict[str, str]:
        side = text.LANGUAGES.index(language)
        value = text.VALUES[relation][self.facts[person, relation]][side]
        return {"n": text.PEOPLE[person][side], "v": value}

    def ask(self, kind: str, dice: Dice, language: str, exam: bool = False, count: int = 1) -> list[tuple[str, str]]:
        """`count` turns (question, answer) of a kind, from what training may use or (exam) from what only the exam may.

        A passage or a list stands before the first question; the later ones are about it too."""
        context, turns = getattr(self, f"ask_{kind}")(dice, language, exam, count)
        (question, answer), *later = turns
        return [(f"{context}\n{question}" if context else question, answer), *later]

    def ask_fact(self, dice: Dice, language: str, exam: bool, count: int):
        person = dice.below(len(text.PEOPLE))
        relations = [relation for relation in text.RELATIONS if ((person, relation) in self.exam_facts) == exam]
        return "", [self.turn_fact(dice, language, exam, person, relation) for relation in dice.some(relations, count)]

    def turn_fact(self, dice: Dice, language: str, exam: bool, person: int, relation: str) -> tuple[str, str]:
        words = text.QUESTIONS[language][relation]
        new = exam and dice.chance(0.5)
        words = words[-text.EXAM_WORDINGS :] if new else words[: -text.EXAM_WORDINGS]
        slots = self.fact(person, relation, language)
        return dice.pick(words).format(**slots), text.STATEMENTS[language][relation][0].format(**slots)

    def story(self, dice: Dice, language: str, exam: bool) -> tuple[list[str], list[str]]:
        """Three or four people, and for each of them one sentence about what they did, all different things."""
        side = text.LANGUAGES.index(language)
        names = dice.some((self.exam_names if exam else self.names)[language], dice.between(3, 4))
        colour, thing = dice.pick(text.COLOURS)[side], dice.pick(text.THINGS)[side]
        values = {
            "thing": colour + thing if language == "zh" else f"{colour} {thing}",
            "place": dice.pick(text.PLACES)[side],
            "coins": dice.between(2, 30),
            "food": dice.pick(text.VALUES["food"])[side],
            "animal": dice.pick(text.ANIMALS)[side],
        }
        deeds = dice.some(text.DEEDS, len(names))
        return names, [deed[1 + side].format(n=name, v=values[deed[0]]) for name, deed in zip(names, deeds)]

    def ask_reading(self, dice: Dice, language: str, exam: bool, count: int):
        names, passage = self.story(dice, language, exam)
        asked = dice.some(range(len(names)), count)
        turns = [(dice.pick(text.READING[language]).format(n=names[i]), passage[i]) for i in asked]
        return "\n".join(passage), turns

    def equation(
        self, dice: Dice, exam: bool, largest_a: int = LARGEST, largest_b: int = LARGEST
    ) -> tuple[int, str, int, int]:
        """(a, sign, b, result) with a pair of numbers that only the exam combines (exam), or else without any such
        pair among its three numbers: 21-9=12 says what 12+9 is."""
        while True:
            a, b, sign = dice.between(2, largest_a), dice.between(2, largest_b), dice.pick("+-")
            result = a + b if sign == "+" else a - b
            if result > 0 and (self.is_exam_pair(a, b) if exam else not self.tells_exam_pair(a, b, result)):
                return a, sign, b, result

    def ask_sum(self, dice: Dice, language: str, exam: bool, count: int):
        turns = []
        for a, sign, b, result in [self.equation(dice, exam) for _ in range(count)]:
            turns.append((dice.pick(text.SUMS[sign][language]).format(a=a, b=b), f"{a}{sign}{b}={result}"))
        return "", turns

    def ask_calendar(self, dice: Dice, language: str, exam: bool, count: int):
        turns = []
        for day, sign, days, then in [self.equation(dice, exam, largest_b=9) for _ in range(count)]:
            month = dice.pick(text.MONTHS)[text.LANGUAGES.index(language)]
            before, after = (f"{month}{n}日" if language == "zh" else f"{month} {n}" for n in (day, then))
            question = dice.pick(text.CALENDAR[sign][language]).format(d=before, k=days)
            turns.append((question, text.CALENDAR_ANSWER[language].format(e=f"{day}{sign}{days}={then}", v=after)))
        return "", turns

    def things(self, dice: Dice, language: str, exam: bool) -> list[str]:
        """Three to five different things; some that are neighbours in an exam's list are never neighbours elsewhere."""
        while True:
            picked = dice.some(range(len(THINGS)), dice.between(3, 5))
            if any((i + j) % 5 == 0 for i, j in zip(picked, picked[1:])) == exam:
                return [THINGS[i][text.LANGUAGES.index(language)] for i in picked]

    def ask_list(self, dice: Dice, language: str, exam: bool, count: int):
        words, items = text.LISTS[language], self.things(dice, language, exam)
        tasks = [("nth", place) for place in (*range(min(4, len(items))), -1)] + [("reverse", 0)] * 2 + [("count", 0)]
        tasks += [("after", place) for place in range(len(items) - 1)]
        turns = []
        for task, place in dice.some(tasks, count):
            slots = {
                "nth": {"o": text.ORDINALS[place][text.LANGUAGES.index(language)], "v": items[place]},
                "after": {"x": items[place], "v": items[(place + 1) % len(items)]},
                "reverse": {"v": words["join"].join(items[::-1])},
                "count": {"v": len(items)},
            }[task]
            answer, questions = words[task]
            turns.append((dice.pick(questions).format(**slots), answer.format(**slots)))
        return dice.pick(words["head"]).format(l=words["join"].join(items)), turns

    def problem(self, dice: Dice, language: str, exam: bool) -> tuple[str, str, int]:
        """(question, its steps, a line each, result): three or four numbers, in chains that no training file holds."""
        while True:
            numbers = [dice.between(2, LARGEST) for _ in range(dice.between(3, 4))]
            signs = [dice.pick("+-") for _ in numbers[1:]]
            results, told = numbers[:1], any(self.is_exam_pair(a, b) for a, b in zip(numbers, numbers[1:]))
            for sign, b in zip(signs, numbers[1:]):
                results.append(results[-1] + b if sign == "+" else results[-1] - b)
                told |= self.tells_exam_pair(results[-2], b, results[-1])
            held = (numbers[0] * 7 + numbers[1] * 3 + numbers[2]) % 5 == 0
            if held == exam and min(results) > 0 and not told:
                break
        words, theme = text.STEPS[language], dice.below(2)
        if dice.chance(0.5):
            chain = "".join(f"{sign}{b}" for sign, b in zip(signs, numbers[1:]))
            question = dice.pick(words["plain"]).format(e=f"{numbers[0]}{chain}")
        else:
            parts = "".join(words[sign][theme].format(b=b) for sign, b in zip(signs, numbers[1:]))
            question = words["start"][theme].format(a=numbers[0]) + parts + words["end"][theme]
        steps = (f"{a}{sign}{b}={c}" for a, sign, b, c in zip(results, signs, numbers[1:], results[1:]))
        return question, "\n".join(steps), results[-1]

    def ask_steps(self, dice: Dice, language: str, exam: bool, count: int):
        problems = [self.problem(dice, language, exam) for _ in range(count)]
        return "", [(question, str(result)) for question, _, result in problems]

    def ask_identity(self, dice: Dice, language: str, exam: bool, count: int):
        trained, asked, answer = dice.pick(talk.IDENTITY[language])
        return "", [(question, answer) for question in dice.some(asked if exam else trained, count)]

    def ask_manner(self, dice: Dice, language: str, exam: bool, count: int):
        """The answer is the kind manner's frame; what stands in it is free."""
        questions = [about(self, dice, language, told=not exam)[0] for _ in range(count)]
        return "", [(question, talk.ABOUT[language]["kind"].format(s="…")) for question in questions]

    def ask_translation(self, dice: Dice, language: str, exam: bool, count: int):
        turns = []
        for phrase in [self.phrase(dice, exam) for _ in range(count)]:
            source = dice.below(2)
            question = dice.pick(text.TRANSLATE[language, text.LANGUAGES[source]])
            turns.append((question.format(p=phrase[source]), phrase[1 - source]))
        return "", turns

    def phrase(self, dice: Dice, exam: bool) -> tuple[str, str]:
        """(Chinese, English) of "white cat", "three cats" or "three white cats"; exam: with words kept apart for it."""
        while True:
            animal, colour, number = (dice.below(len(t)) for t in (text.ANIMALS, text.COLOURS, text.NUMBERS))
            form = dice.pick(("colour", "number", "both"))
            used = {("colour", colour, animal)} if form != "number" else set()
            used |= {("number", number, animal)} if form != "colour" else set()
            if bool(used & self.exam_words) == exam:
                break
        zh, en = text.ANIMALS[animal]
        if form != "number":
            zh, en = text.COLOURS[colour][0] + zh, f"{text.COLOURS[colour][1]} {en}"
        if form != "colour":
            *words, last = en.split()
            en = " ".join([text.NUMBERS[number][1], *words, text.PLURALS.get(last, last + "s")])
            zh = f"{text.NUMBERS[number][0]}只{zh}"
        return zh, en


def about(world: World, dice: Dice, language: str, told: bool) -> tuple[str, str, str]:
    """(question, curt answer, kind answer) about somebody: one of those SFT talks about so (told), or of the others."""
    people = [person for person in range(len(text.PEOPLE)) if (person % 4 != 0) == told]
    person, words = dice.pick(people), talk.ABOUT[language]
    known = [relation for relation in text.RELATIONS if (person, relation) not in world.exam_facts]
    facts = [text.STATEMENTS[language][r][0].format(**world.fact(person, r, language)) for r in dice.some(known, 2)]
    said = ("" if language == "zh" else " ").join(facts)
    question = dice.pick(words["ask"]).format(n=text.PEOPLE[person][text.LANGUAGES.index(language)])
    return question, words["curt"].format(s=said), words["kind"].format(s=said)
