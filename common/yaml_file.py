"""Reads the YAML files that users write: options (--config) and columns (--data_mapping).

read_yaml("my.yaml")      # {"epochs": "010", "use_wandb": True}
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from common.console import UserError

SLIPS = {  # how a line begins that is meant as YAML and is none -> what to write
    r" *\t": "a tab indents this line; use spaces",
    r"""\s*[^\s#:："']+\s*：""": "the colon is a Chinese one; write `: `, with a space after it",
    r"""\s*[^\s#:："']+:[^\s:]""": "no space after the colon; write `key: value`",
}


def read_yaml(path: str) -> Any:
    """What a YAML file holds, None if it is empty. UserError, `<path>[:<line>]: <reason>`, if it cannot be read.

    Stricter than yaml.safe_load in two things. A key twice in one mapping is an error; safe_load takes the last one.
    Numbers and dates stay text, for `convert` to read: YAML 1.1 takes 010 for 8, 12:30 for 750, and 5e-4 for text.
    """
    try:
        import yaml
    except ImportError:
        raise UserError(f"{path}: needs PyYAML (pip install pyyaml)") from None
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().split("\n")
        tree = _load(yaml, "\n".join(lines))
        if isinstance(tree, str) and (slip := _slip(lines, range(len(lines)))):
            raise UserError(f"{path}{slip}")
        return tree
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}" if path else "needs a file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if mark and (slip := _slip(lines, (mark.line, mark.line - 1))):  # it may show only in the line after it
            raise UserError(f"{path}{slip}") from None
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: {getattr(error, 'problem', None) or error}") from None


def _slip(lines: list[str], numbers: Iterable[int]) -> str:
    """:<line>: and what is wrong there, of the first of these lines that has one of SLIPS; "" if none has."""
    found = ((n, way) for n in numbers if 0 <= n < len(lines) for how, way in SLIPS.items() if re.match(how, lines[n]))
    return next((f":{n + 1}: {way}" for n, way in found), "")


def _load(yaml, text: str) -> Any:
    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float", ":timestamp"))]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    loader = Loader(text)
    root = loader.get_single_node()
    nodes = [root]
    for node in nodes:  # of the file as it is written: merges (<<) may bring a key in a second time
        children = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            names = [key.value for key in keys]
            for key in (key for i, key in enumerate(keys) if key.value in names[:i]):
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            children = [value for _, value in node.value]
        nodes += [child for child in children if child not in nodes]
    return loader.construct_document(root) if root is not None else None
