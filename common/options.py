"""A frozen dataclass -> command line and YAML -> a checked instance of it.

    @dataclass(frozen=True)
    class Chat(Options):
        temperature: float = option(0.7, "0 takes the likeliest token", within="[0, 2]", aliases=("temp",))

    chat = parse(Chat)          # --temperature 0.5, --temp=0.5, --config my.yaml with `temperature: 5e-1`

Order of authority: command line, then the YAML file, then the default. `-` and `_` are the same in every name; YAML
sections may have any name and depth. All problems are reported at once, with exit status 2.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, get_args, get_origin, get_type_hints

from common.console import UserError
from common.files import ROOT

SCRIPTS = ("trainer/train_*.py", "eval_model.py", "scripts/*_data.py")  # that have options
YES, NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


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

    aliases  other spellings; "bf16=bfloat16|float32" is a switch that stands for a value (on|off)
    within   the interval a number must lie in, as mathematics writes it: "[0, 1)"
    path     what is typed is relative to where it is typed, and made absolute
    switch   what a bare flag (or true) and false mean for an option whose values are words
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
    """Base of everything that `parse` can fill."""

    settled_by_switch: ClassVar[dict[str, tuple[str, ...]]] = {}  # another script's switch -> what its `false` settles
    needless: ClassVar[dict[str, str]] = {}  # what others have a flag for -> why nothing has to be said here
    missing: ClassVar[dict[str, str]] = {}  # what others have a flag for -> what is not built yet

    def with_launcher_settings(self) -> Options:
        """These values, completed by what is known only where the program runs."""
        return self

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each. Subclasses add what involves several options."""
        found = []
        for spec in specs(type(self)).values():
            value = getattr(self, spec.name)
            if value is None:
                continue
            if spec.choices and value not in spec.choices:
                found.append(f"--{spec.name} {value}: choose from {', '.join(spec.choices)}")
            if spec.within and not _inside(value, spec.within):
                found.append(f"--{spec.name} {_show(value)}: must be {_in_words(spec.within)}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain values for checkpoints and run.json; flags that only a launcher sets are left out."""
        values = {spec.name: getattr(self, spec.name) for spec in specs(type(self)).values() if not spec.hidden}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class Spec(NamedTuple):
    """One option, read off its dataclass field."""

    name: str
    kind: type  # int, float, str or bool
    many: bool  # tuple[kind, ...]
    optional: bool  # kind | None
    default: Any
    help: str
    aliases: tuple[str, ...]
    choices: tuple[str, ...] | None
    within: str
    path: bool
    switch: tuple[str, str] | None
    hidden: bool
    owner: type  # the class that introduced it

    def spellings(self) -> list[str]:
        return [self.name, *(alias.partition("=")[0] for alias in self.aliases)]

    def stands_for(self, spelling: str) -> list[str] | None:
        """["bfloat16", "float32"] for bf16 (what on and off mean); None for a plain spelling."""
        return next((a.partition("=")[2].split("|") for a in self.aliases if a.startswith(spelling + "=")), None)


def specs(cls: type) -> dict[str, Spec]:
    hints, found = get_type_hints(cls), {}
    for item in fields(cls):
        # A subclass that only restates a default has no metadata there: help and aliases come from its base.
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


def parse(cls: type, argv: list[str] | None = None, *, prog: str | None = None, description: str | None = None) -> Any:
    """argv (default: the command line) -> a checked instance of `cls`, or every problem on stderr and exit status 2."""
    known, problems = specs(cls), []
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        usage="%(prog)s [--config file.yaml] [--option value ...]",
        epilog=_help(known),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help=argparse.SUPPRESS, nargs="?", const="")
    for spec in known.values():
        for spelling in spec.spellings():
            bare = spec.kind is bool or spec.switch or spec.stands_for(spelling)
            parser.add_argument(
                f"--{spelling}",
                dest=spec.name,
                action=_Record,
                help=argparse.SUPPRESS,
                **{"nargs": "*"} if spec.many else {"nargs": "?", "const": "true" if bare else ""},
            )
    words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    seen, unknown = parser.parse_known_args(words, argparse.Namespace(given=[]))

    stated = _settle(_from_file(seen.config, cls, problems), problems) if seen.config is not None else {}
    stated |= _settle([(f"--{spelling}", known[name], spelling, text) for name, spelling, text in seen.given], problems)
    _refuse(list(_flags(unknown)), cls, problems)

    try:
        config = cls(**stated).with_launcher_settings()
        problems += config.problems()
    except ValueError as error:
        problems.append(str(error))
    if problems:
        if os.environ.get("RANK", "0") == "0":  # every rank finds the same ones
            print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
        raise SystemExit(2)
    return config


class _Record(argparse.Action):
    """Keeps (option, spelling, text) of every flag in order, so that contradictions can be named."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.given.append((self.dest, option_string[2:], values or ""))


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _flags(words: list[str]) -> Iterator[tuple[str, str, str]]:
    """What argparse did not know -> (as typed, key, value); a word that follows no such flag stands alone."""
    while words:
        typed, equals, value = words[0].partition("=")
        words = words[1:]
        while typed.startswith("--") and not equals and words and not words[0].startswith("--"):
            value, words = words[0], words[1:]
        yield typed, typed.removeprefix("--"), value


def _read_yaml(yaml, file) -> Any:
    """yaml.safe_load, which takes the last of two equal keys without a word; here they are an error."""
    loader = yaml.SafeLoader(file)
    root = loader.get_single_node()
    nodes = [root]
    for node in nodes:  # before aliases and merges (<<) are put in place: what is written is looked at
        children = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            names = [key.value for key in keys]
            for key in (key for i, key in enumerate(keys) if key.value in names[:i]):
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            children = [value for _, value in node.value]
        nodes += [child for child in children if child not in nodes]
    return loader.construct_document(root) if root is not None else None


def _from_file(path: str, cls: type[Options], problems: list[str]) -> list[tuple[str, Spec, str, Any]]:
    """A YAML file -> rows for `_settle`. Sections may have any name and depth."""
    try:
        import yaml
    except ImportError:
        problems.append(f"--config {path}: needs PyYAML (pip install pyyaml)")
        return []
    try:
        with open(path, encoding="utf-8-sig") as file:
            tree = _read_yaml(yaml, file) or {}
    except OSError as error:
        problems.append(f"--config {path}: {error.strerror}" if path else "--config: needs a file")
        return []
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = f":{error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        problems.append(f"--config {path}{line}: {getattr(error, 'problem', None) or error}")
        return []
    if not isinstance(tree, dict):
        problems.append(f"--config {path}: expected `key: value` lines, found a {type(tree).__name__}")
        return []

    by_spelling = {spelling: spec for spec in specs(cls).values() for spelling in spec.spellings()}

    def leaves(tree: dict, prefix: str) -> Iterator[tuple[str, str, Any]]:
        for key, value in tree.items():
            spelling = str(key).replace("-", "_")
            if isinstance(value, dict) and spelling not in by_spelling:
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", spelling, value

    found = list(leaves(tree, f"{path}: "))
    _refuse([row for row in found if row[1] not in by_spelling], cls, problems)
    return [(where, by_spelling[key], key, value) for where, key, value in found if key in by_spelling]


def owners(key: str) -> dict[str, Spec]:
    """The scripts that have this option, in our words or in others'."""
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
    """(where, key, value) that this script does not know: name the script that does, or the nearest key."""
    known = {key: owners(key) for _, key, _ in rows}
    switches = {key for key, found in known.items() if any(spec.kind is bool for spec in found.values())}
    off = [key for _, key, value in rows if key in switches and _is_off(value)]
    settled = {name for key in off for name in (key, *cls.settled_by_switch.get(key, ()))}
    for where, key, _ in rows:
        if key in cls.needless:
            print(f"note: {where}: {cls.needless[key]}", file=sys.stderr)
            continue
        if key in cls.missing:
            problems.append(f"{where}: {cls.missing[key]} not built yet; leave it out")
            continue
        if known[key]:
            if key not in settled:
                scripts = list(known[key])
                listed = ", ".join(scripts[:3]) + (", ..." if scripts[3:] else "")
                problems.append(f"{where}: not for this script; {listed} know{'s' * (len(scripts) == 1)} it")
            continue
        import difflib

        near = difflib.get_close_matches(key, [name for spec in specs(cls).values() for name in spec.spellings()], 1)
        problems.append(f"{where}: unknown option; " + (f"did you mean {near[0]}?" if near else "--help lists them"))


def _settle(rows: list[tuple[str, Spec, str, Any]], problems: list[str]) -> dict[str, Any]:
    """(where, option, spelling, raw value) of one source -> {option: value}; contradictions become problems."""
    stated: dict[str, dict[str, tuple[Any, Any]]] = {}  # option -> where -> (value, the value it denies)
    for where, spec, spelling, raw in rows:
        try:
            value, denied = _convert(spec, spelling, raw)
        except ValueError as error:
            problems.append(f"{where} {raw}: {error}" if raw not in ("", [""], None) else f"{where}: {error}")
            continue
        places = stated.setdefault(spec.name, {})
        if spec.many and where in places:  # --data_path a --data_path b
            value = places[where][0] + value
        places[where] = value, denied  # the same flag again: the last one counts

    for name, places in stated.items():
        firm = {where: value for where, (value, denied) in places.items() if denied is None}
        chosen = list((firm or {where: value for where, (value, _) in places.items()}).items())[-1]
        for where, (value, denied) in places.items():
            if value != chosen[1] if denied is None else denied == chosen[1]:
                problems.append(f"{where} and {chosen[0]}: both set {name}, to different values; give one of them")
        stated[name] = chosen[1]
    return stated


# ---- values ----


def _convert(spec: Spec, spelling: str, raw: Any) -> tuple[Any, Any]:
    """The value, and for a switched-off `--bf16 0` the value that it denies."""
    if raw is None or spec.optional and str(raw).lower() in ("none", "null"):
        if spec.optional:
            return None, None
        raise UserError("needs a value")
    if raw == "":
        raise UserError("needs a value")
    if stands_for := spec.stands_for(spelling):
        on, off = stands_for
        return (on, None) if _truth(raw) else (off, on)
    if not spec.many:
        return _scalar(spec, raw), None
    items = raw if isinstance(raw, list) else [raw]
    if "" in items:
        raise UserError("needs a value")
    if not spec.path:
        items = [part.strip() for item in items for part in str(item).split(",")]
    return tuple(_scalar(spec, item) for item in items), None


def _scalar(spec: Spec, raw: Any) -> Any:
    if isinstance(raw, (dict, list)):
        raise UserError("expected a single value")
    if spec.kind is bool:
        return _truth(raw)
    if spec.kind is str:
        if spec.switch and str(raw).lower() in YES + NO:
            return spec.switch[0] if _truth(raw) else spec.switch[1]
        if isinstance(raw, bool):
            raise UserError("YAML reads this word as true or false; put it in quotes")
        text = (spec.stands_for(str(raw)) or [str(raw)])[0]  # --dtype bf16
        return os.path.abspath(os.path.expanduser(text)) if spec.path else text
    # YAML 1.1 reads 5e-4, which has no dot, as text: numbers are made here, by the option's own type.
    whole = spec.kind is int
    try:
        if isinstance(raw, bool):
            raise ValueError
        number = float(raw)
        return int(raw) if whole and isinstance(raw, str) and raw.strip("+-").isdigit() else _finite(number, whole)
    except (TypeError, ValueError, OverflowError):
        raise UserError("expected a whole number" if whole else "expected a number") from None


def _finite(number: float, whole: bool) -> float | int:
    if not math.isfinite(number) or whole and number != int(number):
        raise ValueError
    return int(number) if whole else number


def _truth(raw: Any) -> bool:
    word = str(raw).lower()
    if word not in YES + NO:
        raise UserError("say true or false (1 or 0, yes or no, on or off)")
    return word in YES


def _is_off(raw: Any) -> bool:
    return str(raw).lower() in NO


def _inside(value: float, within: str) -> bool:
    low, high = (float(bound) for bound in within[1:-1].split(","))
    return low < value < high or value == low and within[0] == "[" or value == high and within[-1] == "]"


def _in_words(within: str) -> str:
    low, high = (bound.strip() for bound in within[1:-1].split(","))
    return f"in {within}" if high != "inf" else f"at least {low}" if within[0] == "[" else f"above {low}"


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_show(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- what people read ----


def describe(config: Options) -> str:
    """The resolved config in a few lines; what differs from the default has a star."""
    parts, default = [], type(config)()  # an instance: some defaults follow from other options
    for spec in specs(type(config)).values():
        value = getattr(config, spec.name)
        if value not in (None, ()) and not spec.hidden:
            parts.append(("*" if value != getattr(default, spec.name) else "") + f"{spec.name}={_show(value)}")
    return textwrap.fill(
        "config (* = not the default): " + " ".join(parts),
        118,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _help(known: dict[str, Spec]) -> str:
    """One block per class, the script's own options first."""
    width = min(shutil.get_terminal_size((110, 24)).columns, 120)
    blocks: dict[type, list[str]] = {}
    for spec in known.values():
        if spec.hidden:
            continue
        kind = {bool: "", int: "N", float: "X", str: "PATH" if spec.path else "TEXT"}[spec.kind]
        kind = ("|".join(spec.choices) if spec.choices else kind) + (" ..." if spec.many else "")
        default = _show(spec.default).removeprefix(str(ROOT) + os.sep)
        text = spec.help if spec.default in (None, (), "") else f"{spec.help} [{default}]"
        if spec.aliases:
            text += "; also " + " ".join(f"--{name}" for name in spec.spellings()[1:])
        text = textwrap.fill(text, width, initial_indent=" " * 32, subsequent_indent=" " * 32, break_on_hyphens=False)
        flag = f"  --{spec.name} {kind}".ljust(32)
        blocks.setdefault(spec.owner, []).append(flag + text[32:] if flag[31:] == " " else f"{flag}\n{text}")

    lines = ["  --config PATH".ljust(32) + "a YAML file with any of these"]
    for owner in sorted(blocks, key=lambda owner: -len(owner.__mro__)):
        title = (owner.__doc__ or "").partition("\n")[0].rstrip(".")
        by_dataclass = title.startswith(owner.__name__ + "(")  # its signature, where the author wrote nothing
        lines += ["", ("Options of this script" if by_dataclass else title) + ":", *blocks[owner]]
    return "\n".join(lines)
