"""Tokenizers with other families' chat templates, and what is trained on in a conversation."""

import json

from tokenizer.text import SHIPPED, Tokenizer


def build(directory, template: str, end: str, names: list[str]) -> Tokenizer:
    """The shipped vocabulary with another family's control tokens after it."""
    spec = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["vocab"] = {token: i - 16 for token, i in spec["model"]["vocab"].items() if i >= 16}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] = [
        {"id": 6384 + n, "content": name, **flags, "special": "think" not in name} for n, name in enumerate(names)
    ]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": names[0]}
    config["chat_template"] = template
    (directory / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.load(directory)


def spoken(tokenizer, encoded) -> list[str]:
    """What is trained on, one text for each uninterrupted stretch."""
    stretches, ids = [], []
    for i, trained in [*zip(*encoded), (0, False)]:
        if trained:
            ids.append(i)
        elif ids:
            stretches.append(tokenizer.decode(ids))
            ids = []
    return stretches
