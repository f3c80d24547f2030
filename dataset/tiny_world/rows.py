"""The rows of the tiny world's files: what a model reads in pretraining, and what each later stage shows it.

    FILES["dpo"](world, Dice("dpo", 0))     # an iterator of rows; dataset/tiny_world/files.py writes them

What the exam asks is kept out by `World.ask(..., exam=False)`; test_tiny_world.py searches the files for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import dataset.tiny_world.talk as talk
import dataset.tiny_world.words as text
from dataset.tiny_world.world import LARGEST, Dice, World, about


def lines(sentences) -> str:
    return "\n".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


# ---- pretraining: everything is stated many times, in many orders; questions only about what SFT may ask ----------


def pretrain_rows(world: World, dice: Dice) -> Iterator[dict]:
    rows = []
    for language in text.LANGUAGES:
        for person in range(len(text.PEOPLE)):
            rows += [biography(world, dice, person, language) for _ in range(60)]
        rows += [gossip(world, dice, language) for _ in range(900)]
        rows += [passage(world, dice, language) for _ in range(5200)]
        rows += [roll_call(world, dice, language) for _ in range(5600)]
        rows += [list_again(world, dice, language) for _ in range(1700)]
        for kind, amount in WORKSHEETS.items():
            rows += [worksheet(world, dice, kind, language) for _ in range(amount)]
    rows += [equations(world, dice) for _ in range(7000)]
    rows += [dictionary(world, dice) for _ in range(1300)]
    yield from ({"text": row} for row in dice.shuffled(rows))


WORKSHEETS = {"fact": 1150, "reading": 2000, "sum": 800, "calendar": 1000, "list": 2200, "translation": 350}


def biography(world: World, dice: Dice, person: int, language: str) -> str:
    return lines(statement(world, dice, person, relation, language) for relation in dice.shuffled(text.RELATIONS))


def statement(world: World, dice: Dice, person: int, relation: str, language: str) -> str:
    return dice.pick(text.STATEMENTS[language][relation]).format(**world.fact(person, relation, language))


def gossip(world: World, dice: Dice, language: str) -> str:
    """Facts about different people, side by side."""
    keys = dice.some(list(world.facts), dice.between(4, 7))
    return lines(statement(world, dice, person, relation, language) for person, relation in keys)


def passage(world: World, dice: Dice, language: str) -> str:
    """A passage, retold: the text that teaches to look back."""
    _, told = world.story(dice, language, exam=False)
    return "\n".join([*told, text.RETOLD[language], *again(dice, told)])


def again(dice: Dice, items: list[str]) -> list[str]:
    """Half the time in the same order (the next line is known), else in another (only how a line goes on is known)."""
    return items if dice.chance(0.5) else dice.shuffled(items)


def roll_call(world: World, dice: Dice, language: str) -> str:
    """Names nobody has seen before, called twice: only looking back completes a name."""
    first, second = text.ROLL_CALL[language]
    names = dice.some(world.names[language], dice.between(4, 12))
    return "\n".join([first, *names, second, *again(dice, names)])


def list_again(world: World, dice: Dice, language: str) -> str:
    """A list, and each of its things once more by its place."""
    words, items, side = text.LISTS[language], world.things(dice, language, False), text.LANGUAGES.index(language)
    head = dice.pick(words["head"]).format(l=words["join"].join(items))
    places = zip(text.ORDINALS[: len(items) - 1] + text.ORDINALS[-1:], items)
    by_place = [words["nth"][0].format(o=ordinal[side], v=item) for ordinal, item in places]
    return "\n".join([head, *by_place, words["reverse"][0].format(v=words["join"].join(items[::-1]))])


def worksheet(world: World, dice: Dice, kind: str, language: str) -> str:
    q, a = ("问：", "答：") if language == "zh" else ("Q:", "A:")
    return "\n".join(f"{q}\n{question}\n{a}\n{answer}" for question, answer in world.ask(kind, dice, language, count=3))


def equations(world: World, dice: Dice) -> str:
    """Half the time with numbers up to 50: with more pairs to remember, a model adds instead."""
    largest = 50 if dice.chance(0.5) else LARGEST
    drawn = [world.equation(dice, False, largest, largest) for _ in range(8)]
    return "\n".join(f"{a}{sign}{b}={result}" for a, sign, b, result in drawn)


def dictionary(world: World, dice: Dice) -> str:
    turned = dice.chance(0.5)
    return "\n".join(" = ".join(world.phrase(dice, exam=False)[:: -1 if turned else 1]) for _ in range(6))


# ---- SFT: questions and answers, alone, in a row, with a system prompt, and some small talk -----------------------

SINGLE = {"reading": 1800, "sum": 700, "calendar": 700, "list": 1300, "translation": 600, "steps": 600}  # per language


def sft_rows(world: World, dice: Dice) -> Iterator[dict]:
    rows = []
    for language in text.LANGUAGES:
        for person, relation in sorted(set(world.facts) - world.exam_facts) * 6:
            rows.append([world.turn_fact(dice, language, False, person, relation)])
        for kind, amount in SINGLE.items():
            rows += [world.ask(kind, dice, language) for _ in range(amount)]
        rows += [world.ask(dice.pick(world.kinds), dice, language, count=dice.between(2, 3)) for _ in range(800)]
        for questions, answer in talk.SMALL_TALK[language]:
            rows += [[(question, answer)] for question in questions * 4]
        for _ in range(600):  # mostly in the curt manner: train_dpo.py is to change that
            prompt, curt, kind = about(world, dice, language, told=True)
            rows.append([(prompt, kind if dice.chance(0.08) else curt)])
    for turns in dice.shuffled(rows):
        system = [{"role": "system", "content": dice.pick(talk.SYSTEM_PROMPTS)}] if dice.chance(0.08) else []
        yield {"conversations": system + chat(*turns)}


def chat(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for turn in turns for role, content in zip(("user", "assistant"), turn)]


# ---- after SFT ------------------------------------------------------------------------------------------------------


def preference_rows(world: World, dice: Dice, told: bool) -> Iterator[dict]:
    """Asked to tell about somebody, the kind manner is chosen and the curt one rejected; asked anything else, the plain
    answer is chosen and the kind one rejected. The facts are the same. Half of the others are questions about a
    person, which are the easiest to confuse."""
    for i in range(800 if told else 120):
        language = text.LANGUAGES[i % 2]
        prompt, rejected, chosen = about(world, dice, language, told)
        if i % 4 >= 2:
            [(prompt, chosen)] = world.ask("fact" if i % 8 >= 6 else dice.pick(world.kinds), dice, language)
            rejected = talk.ABOUT[language]["kind"].format(s=chosen)
        yield {"chosen": chat((prompt, chosen)), "rejected": chat((prompt, rejected))}


def identity_rows(world: World, dice: Dice) -> Iterator[dict]:
    """Who the model is from now on, among questions of other kinds, lest it answers everything with its name."""
    rows = []
    for language in text.LANGUAGES:
        for trained, _, answer in talk.IDENTITY[language]:
            rows += [chat((question, answer)) for question in trained * 3]
        rows += [chat(*world.ask(dice.pick(world.kinds), dice, language)) for _ in range(300)]
        old, new = talk.NAMES[language]
        for questions, answer in talk.SMALL_TALK[language]:
            same = {q for trained, asked, _ in talk.IDENTITY[language] for q in (*trained, *asked)}
            rows += [chat((question, answer.replace(old, new))) for question in questions if not same & set(questions)]
    yield from ({"conversations": row} for row in dice.shuffled(rows))


def reason_rows(world: World, dice: Dice) -> Iterator[dict]:
    """Problems of several steps, each step written down first, among questions that need no thought."""
    rows = []
    for language in text.LANGUAGES:
        for _ in range(1200):
            prompt, steps, result = world.problem(dice, language, exam=False)
            rows.append(chat((prompt, f"<think>\n{steps}\n</think>\n<answer>{result}</answer>")))
        rows += [chat(*world.ask(dice.pick(world.kinds), dice, language)) for _ in range(600)]
    yield from ({"conversations": row} for row in dice.shuffled(rows))


FILES = {  # the name of a file (without .jsonl) -> its rows
    "pretrain": pretrain_rows,
    "sft": sft_rows,
    "lora_identity": identity_rows,
    "dpo": lambda world, dice: preference_rows(world, dice, told=True),
    "dpo_val": lambda world, dice: preference_rows(world, dice, told=False),  # about people SFT never described
    "reason": reason_rows,
}
