"""A frozen dataclass -> command line and YAML -> a checked instance of it.

    @dataclass(frozen=True)
    class Chat(Options):
        temperature: float = option(0.7, "0 takes the likeliest token", within="[0, 2]", aliases=("temp",))

    chat = parse(Chat)          # --temperature 0.5, --temp=0.5, --config my.yaml with `temperature: 5e-1`

The command line wins over the YAML file, and the file over the default. `-` and `_` are the same in every name. YAML
sections may have any name and depth. All problems are reported at once, with exit status 2.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from common.console import UserError, note, printable
from common.files import ROOT
from common.values import NO, YES, Spec, as_typed, convert, inside, interval_in_words, is_off, show, with_places
from common.yaml_file import read_yaml

SCRIPTS = ("trainer/train_*.py", "eval_model.py", "scripts/*_data.py")  # where to look for the owner of an option


def option(
    default: Any,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] | None = None,
    within: str = "",
    path: bool = False,
    switch: tuple[str, str] | None = None,
) -> Any:
    """A dataclass field that is also a flag and a YAML key.

    aliases  other spellings; "bf16=bfloat16|float32" is a switch: --bf16 means bfloat16, --bf16 false means float32
    choices  the values allowed
    within   the interval a number must lie in, written as in mathematics: "[0, 1)"
    path     a path, made absolute: it is relative to the working directory
    switch   for an option whose values are words: what true (or the flag without a value) and false mean
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "aliases": aliases,
            "choices": choices,
            "within": within,
            "path": path,
            "switch": switch,
        },
    )


@dataclass(frozen=True)
class Options:
    """Base class of all options that `parse` can read.

    Three tables say what to do with options that this script does not have:

    translated         an option of other projects -> a function of its value (text, or what YAML made of it) that gives
                       the options of ours that mean the same, {name: value}, or a UserError that says what to write
    needless           an option of other projects -> why it is not needed. It is accepted, with this as a note
    missing            an option of other projects -> what is not built yet. It is refused, with this in the message
    """

    translated: ClassVar[dict[str, Callable[[Any], dict[str, Any]]]] = {}
    needless: ClassVar[dict[str, str]] = {}
    missing: ClassVar[dict[str, str]] = {}

    def with_launcher_settings(self) -> Options:
        """These options, completed by what the launcher (torchrun, deepspeed, ...) has set. Subclasses override it."""
        return self

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each. Subclasses add checks that involve several options."""
        found = []
        for spec in specs(type(self)).values():
            value = getattr(self, spec.name)
            if value is None:
                continue
            if spec.choices and value not in spec.choices:
                found.append(f"--{spec.name} {value}: choose from {', '.join(spec.choices)}")
            if spec.within and not inside(value, spec.within):
                found.append(f"--{spec.name} {show(value)}: must be {interval_in_words(spec.within)}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain values for checkpoints and run.json, without the options that only a launcher sets."""
        values = {spec.name: getattr(self, spec.name) for spec in specs(type(self)).values() if not spec.hidden}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def specs(cls: type) -> dict[str, Spec]:
    """{name: Spec} of all options of a class, in the order of its fields."""
    hints, found = get_type_hints(cls), {}
    for item in fields(cls):
        # A subclass that only changes a default has no metadata for it: help and aliases come from its base class.
        owners = [base for base in reversed(cls.__mro__) if item.name in base.__dict__.get("__dataclass_fields__", ())]
        metas = [base.__dict__["__dataclass_fields__"][item.name].metadata for base in owners]
        meta = [meta for meta in metas if meta][-1]
        hint, optional = hints[item.name], type(None) in get_args(hints[item.name])
        if optional:
            hint = next(arg for arg in get_args(hint) if arg is not type(None))
        many = get_origin(hint) is tuple
        found[item.name] = Spec(
            item.name,
            get_args(hint)[0] if many else hint,
            many,
            optional,
            item.default,
            hidden=meta["help"] == argparse.SUPPRESS,
            owner=owners[0],
            **meta,
        )
    return found


# ---- parsing ----


def parse(
    cls: type,
    argv: list[str] | None = None,
    *,
    bare: str = "",
    description: str | None = None,
) -> Any:
    """argv (default: the command line) -> a checked instance of `cls`.

    bare: the option whose flag may be left out: words that belong to no other flag are its values. If anything is
    wrong, every problem is printed to stderr and the program ends with status 2.
    """
    problems: list[str] = []
    words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    words = _with_flag(words, bare, cls) if bare else words
    seen, unknown = _parser(cls, description).parse_known_args(words, argparse.Namespace(given=[]))
    first_rank = os.environ.get("RANK", "0") == "0"  # all ranks find the same problems
    if not words and os.path.isfile("config.yaml") and first_rank:  # other projects read it unasked
        note("note: the config.yaml in this directory is not used; to use it: --config config.yaml")

    in_file = _from_file(seen.config, cls, problems) if seen.config is not None else []
    stated = _settle(in_file, problems)
    typed = [(f"--{spelling}", spelling, text) for spelling, text in seen.given]
    overriding = _settle(_translate(typed, cls, problems), problems)
    stated |= overriding
    places = {spec.name: where for where, spec, *_ in in_file if spec.name not in overriding}
    _refuse(list(_flags(unknown)), cls, problems)

    try:
        config = cls(**stated).with_launcher_settings()
        problems += [with_places(problem, places) for problem in config.problems()]
    except ValueError as error:
        problems.append(str(error))
    if problems:
        if first_rank:
            print("\n".join(f"error: {printable(problem, one_line=True)}" for problem in problems), file=sys.stderr)
        raise SystemExit(2)
    return config


def _parser(cls: type[Options], description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [--config file.yaml] [--option value ...]",
        epilog=_help(specs(cls), cls()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help=argparse.SUPPRESS, nargs="?", const="")
    for spec in specs(cls).values():
        for spelling in spec.spellings():
            alone = "true" if spec.kind is bool or spec.switch or spec.stands_for(spelling) else ""
            nargs, const = ("*", None) if spec.many else ("?", alone)
            parser.add_argument(f"--{spelling}", action=_Record, help=argparse.SUPPRESS, nargs=nargs, const=const)
    for key in cls.translated:
        parser.add_argument(f"--{key}", action=_Record, help=argparse.SUPPRESS, nargs="*")
    return parser


class _Record(argparse.Action):
    """Records (spelling, text) of every flag in order, so that a message can name contradictory ones."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.given.append(((option_string or "")[2:], values or ""))


def _by_spelling(cls: type[Options]) -> dict[str, Spec]:
    """{name or alias: Spec} of all options of a class."""
    return {spelling: spec for spec in specs(cls).values() for spelling in spec.spellings()}


def _underscored(word: str) -> str:
    """--batch-size=4 -> --batch_size=4"""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _with_flag(words: list[str], bare: str, cls: type[Options]) -> list[str]:
    """The words, with --`bare` before those that belong to no flag: at the beginning, after a switch or a value."""
    known = _by_spelling(cls)
    found, owner, values = [], None, 1  # the option that the last flag named, and how many words followed it
    for word in words:
        if word.startswith("-"):
            name, equals, _ = word.partition("=")
            owner, values = known.get(name.removeprefix("--")), len(equals)
        else:
            full = values and not (owner and owner.many)
            switch = owner and owner.kind is bool and word.lower() not in YES + NO
            if (full or switch) and (known[bare].many or f"--{bare}" not in found):
                found.append(f"--{bare}")
                owner, values = known[bare], 0
            values += 1
        found.append(word)
    return found


def _flags(words: list[str]) -> Iterator[tuple[str, str, str]]:
    """Words that argparse did not know -> (as typed, key, value). A word that is no flag's value is a key itself."""
    while words:
        typed, equals, value = words[0].partition("=")
        words = words[1:]
        while typed.startswith("--") and not equals and words and not words[0].startswith("--"):
            value, words = words[0], words[1:]
        yield typed, typed.removeprefix("--"), value


def _from_file(path: str, cls: type[Options], problems: list[str]) -> list[tuple[str, Spec, str, Any]]:
    """A YAML file -> rows for `_settle`: (where, option, spelling, value). Sections may have any name and depth."""
    try:
        tree = read_yaml(path) or {}
    except UserError as error:
        problems.append(f"--config {error}" if path else f"--config: {error}")
        return []
    if not isinstance(tree, dict):
        problems.append(f"--config {path}: expected `key: value` lines, found a {type(tree).__name__}")
        return []

    understood = _by_spelling(cls).keys() | cls.translated

    def leaves(tree: dict, prefix: str) -> Iterator[tuple[str, str, Any]]:
        for key, value in tree.items():
            spelling = str(key).replace("-", "_")
            if isinstance(value, dict) and spelling not in understood:
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", spelling, value

    found = list(leaves(tree, f"{path}: "))
    _refuse([row for row in found if row[1] not in understood], cls, problems)
    return _translate([row for row in found if row[1] in understood], cls, problems)


def _translate(
    rows: list[tuple[str, str, Any]], cls: type[Options], problems: list[str]
) -> list[tuple[str, Spec, str, Any]]:
    """(where, key, value) -> rows for `_settle`; a key of `translated` becomes the options that mean the same."""
    by_spelling, found = _by_spelling(cls), []
    for where, key, value in rows:
        if key in by_spelling:
            found.append((where, by_spelling[key], key, value))
            continue
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        try:
            ours = cls.translated[key](value)
        except UserError as error:
            problems.append(f"{where}{f' {as_typed(value)}' if value else ''}: {error}")
        else:
            found += [(where, by_spelling[name], name, item) for name, item in ours.items()]
    return found


def owners(key: str) -> dict[str, Spec]:
    """{script: option} of all scripts that have an option of this name or alias."""
    found = {}
    scripts = [path for pattern in SCRIPTS for path in sorted(ROOT.glob(pattern))]
    for path in scripts:
        name = path.relative_to(ROOT)
        module = importlib.import_module(".".join(name.with_suffix("").parts))
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, Options) and cls.__module__ == module.__name__:
                found |= {name.as_posix(): spec for spec in specs(cls).values() if key in spec.spellings()}
    return found


def _refuse(rows: list[tuple[str, str, Any]], cls: type[Options], problems: list[str]) -> None:
    """(where, key, value) that this script does not know -> problems that name the script that does, or the nearest
    key."""
    known = {key: owners(key) for _, key, _ in rows}
    switches = {key for key, found in known.items() if any(spec.kind is bool for spec in found.values())}
    off = {key for _, key, value in rows if key in switches and is_off(value)}
    for where, key, _ in rows:
        if key in cls.needless:
            note(f"note: {where}: {cls.needless[key]}")
            continue
        if key in cls.missing:
            problems.append(f"{where}: {cls.missing[key]} not built yet; leave it out")
            continue
        if known[key]:
            if key not in off:
                scripts = list(known[key])
                listed = ", ".join(scripts[:3]) + (", ..." if scripts[3:] else "")
                problems.append(f"{where}: not for this script; {listed} know{'s' * (len(scripts) == 1)} it")
            continue
        import difflib

        near = difflib.get_close_matches(key, _by_spelling(cls), 1)
        problems.append(f"{where}: unknown option; " + (f"did you mean {near[0]}?" if near else "--help lists them"))


def _settle(rows: list[tuple[str, Spec, str, Any]], problems: list[str]) -> dict[str, Any]:
    """(where, option, spelling, raw value) of one source -> {option: value}.

    Two spellings of an option that ask for different values are a problem; of the same flag twice, the last one counts.
    """
    stated: dict[str, dict[str, tuple[Any, Any]]] = {}  # option -> where -> (value, denied), see `convert`
    for where, spec, spelling, raw in rows:
        try:
            value, denied = convert(spec, spelling, raw)
        except ValueError as error:
            shown = f" {as_typed(raw)}" if raw not in ("", [""], None) else ""
            problems.append(f"{where}{shown}: {error}")
            continue
        places = stated.setdefault(spec.name, {})
        if spec.many and where in places:  # --data_path a --data_path b
            value = places[where][0] + value
        places[where] = value, denied

    settled: dict[str, Any] = {}
    for name, places in stated.items():
        # `--bf16 0 --fp16 1`: the switch that is off gives way, and contradicts only the value that it rules out
        firm = {where: value for where, (value, denied) in places.items() if denied is None}
        chosen_where, chosen = list((firm or {where: value for where, (value, _) in places.items()}).items())[-1]
        for where, (value, denied) in places.items():
            contradicts = value != chosen if denied is None else denied == chosen
            if contradicts:
                problems.append(f"{where} and {chosen_where}: both set {name}, to different values; give one of them")
        settled[name] = chosen
    return settled


# ---- printed ----


def describe(config: Options) -> str:
    """The resolved config in a few lines; what differs from the default has a star."""
    parts, default = [], type(config)()  # an instance: some defaults follow from other options
    for spec in specs(type(config)).values():
        value = getattr(config, spec.name)
        if value not in (None, ()) and not spec.hidden:
            parts.append(("*" if value != getattr(default, spec.name) else "") + f"{spec.name}={show(value)}")
    return textwrap.fill(
        "config (* = not the default): " + " ".join(parts),
        118,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _help(known: dict[str, Spec], default: Options) -> str:
    """The text of --help: a block for each class that introduced options, the script's own first.

    default: an instance without arguments, since some defaults follow from other options
    """
    width = min(shutil.get_terminal_size((110, 24)).columns, 120)
    blocks: dict[type, list[str]] = {}
    for spec in known.values():
        if spec.hidden:
            continue
        kind = {bool: "", int: "N", float: "X", str: "PATH" if spec.path else "TEXT"}[spec.kind]
        kind = ("|".join(spec.choices) if spec.choices else kind) + (" ..." if spec.many else "")
        value = getattr(default, spec.name)
        shown = show(value).removeprefix(str(ROOT) + os.sep)
        text = spec.help if value in (None, (), "") else f"{spec.help} [{shown}]"
        if spec.aliases:
            text += "; also " + " ".join(f"--{name}" for name in spec.spellings()[1:])
        text = textwrap.fill(text, width, initial_indent=" " * 32, subsequent_indent=" " * 32, break_on_hyphens=False)
        flag = f"  --{spec.name} {kind}".ljust(32)
        blocks.setdefault(spec.owner, []).append(flag + text[32:] if flag[31:] == " " else f"{flag}\n{text}")

    lines = ["  --config PATH".ljust(32) + "a YAML file with any of these"]
    for owner in sorted(blocks, key=lambda owner: -len(owner.__mro__)):
        title = (owner.__doc__ or "").partition("\n")[0].rstrip(".")
        by_dataclass = title.startswith(owner.__name__ + "(")  # dataclass makes its signature the docstring
        lines += ["", ("Options of this script" if by_dataclass else title) + ":", *blocks[owner]]
    return "\n".join(lines)
