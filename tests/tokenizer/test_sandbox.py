"""Templates that never end, fill the memory or reach for attributes: one clear line, and soon. The usual ones work."""

import time

import pytest

from common.console import UserError
from tests.helpers.rows import said
from tests.helpers.templates import build
from tokenizer import sandbox
from tokenizer.chat import encode_chat
from tokenizer.sandbox import Bounded

NAMES = ["<|im_start|>", "<|im_end|>"]
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ loop.index }}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(40) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "{% generation %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endgeneration %}",
]
NESTED = "{% set ns = namespace(x=['a']) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
HUGE = [
    "{{ 'a' * 9999999999 }}",
    "{{ [1] * 9999999999 }}",
    "{{ 9 ** 999999999 }}",
    "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    NESTED + "{{ ns.x }}",
    NESTED + "{{ ns.x | tojson }}",
    NESTED + "{{ ns.x ~ 'b' }}",
    "{{ 'a' | center(9999999999) }}",
    "{{ 'a'.center(9999999999) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "{{ lipsum(n=99999) }}",
    "{% generation %}" + NESTED + "{{ ns.x ~ 'b' }}{% endgeneration %}",
]
REACHING = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ messages.append(1) }}",
    "{% set x = messages[0] %}{{ x.update({'role': 'system'}) }}",
    "{% include '/etc/passwd' %}",
]
SEEING_NOTHING = [
    "{{ messages.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
]


@pytest.mark.parametrize("template", ENDLESS + HUGE + REACHING)
def test_a_template_that_means_harm(tmp_path, monkeypatch, template):
    monkeypatch.setattr(sandbox, "STEPS", 50_000)
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        encode_chat(build(tmp_path, template + "{{ messages[0].content }}", "<|im_end|>", NAMES), [said("user", "x")])
    assert "the chat template refuses this conversation" in str(caught.value) and "\n" not in str(caught.value)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("template", SEEING_NOTHING)
def test_attributes_are_not_there(tmp_path, template):
    """As Jinja prints what is undefined: nothing."""
    tokenizer = build(tmp_path, template + "{{ messages[0].content }}", "<|im_end|>", NAMES)
    assert tokenizer.decode(encode_chat(tokenizer, [said("user", "hello")]).ids) == "hello"


@pytest.mark.parametrize(
    "template, named",
    [
        ("x" * 1_000_001, "1,000,001 characters long"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "cannot be compiled"),
        ("{% for i in x %}" * 25 + "{% endfor %}" * 25, "cannot be compiled"),
        ("{% if %}", "Expected an expression"),
        ("{% generation %}" * 5000 + "{% endgeneration %}" * 5000, "cannot be compiled"),
        ("{% generation %}{{ 1 }}", "Unexpected end of template"),
    ],
)
def test_a_template_that_is_none(tmp_path, template, named):
    with pytest.raises(UserError, match=f"chat template: .*{named}"):
        encode_chat(build(tmp_path, template, "<|im_end|>", NAMES), [said("user", "x")])


def test_a_file_too_large_to_be_read(tmp_path):
    tokenizer = build(tmp_path, "{{ 1 }}", "<|im_end|>", NAMES)
    with open(tmp_path / "chat_template.jinja", "wb") as file:
        file.truncate(20_000_000)
    with pytest.raises(UserError, match="chat_template.jinja: 20,000,000 bytes, too much for a chat template"):
        type(tokenizer).load(tmp_path)


def render(source: str, **values) -> str:
    environment = Bounded()
    return environment.render_bounded(environment.from_string(source), values)


def test_what_templates_do_gives_what_jinja_gives():
    """Everything that is watched: loops with their variable, operators, filters, calls, ~."""
    import jinja2

    source = """{%- macro tag(name, close=false) %}<{{ '/' if close }}{{ name }}>{% endmacro -%}
    {% for m in messages[::-1] if m.role != 'tool' %}
      {{- loop.index0 ~ '/' ~ loop.length ~ loop.last ~ (loop.previtem.role if not loop.first) }}{{ tag('a') }}
      {{- tag('a', close=true) }}{{ m.content | trim | upper }}{{ '%s=%d' % (m.role, 3) }}{{ 2 ** 5 * 3 + 1 }}
      {{- '{:>5}'.format(m.role) }}{{ m.content.split(' ')[-1].strip('x') }}{{ 10 ** 12 }}{{ 'ab' * 2 }}
    {% else %}none{% endfor %}
    {% for k, v in extra.items() %}{{ k }}{{ v | string | length }}{{ v | default(1234567890123) }}{% endfor %}
    {% for x in nothing %}{% else %}empty{% endfor %}{{ [3, 1, 2] | sort | join(',') }}
    {{ messages | map(attribute='role') | list }}
    {{ messages | selectattr('role', 'equalto', 'tool') | list | length }}{{ 'a' in 'abc' }}{{ namespace(a=1).a }}"""
    messages = [said("user", "100% {sure} 12345678"), said("tool", "t"), said("assistant", " x yx ")]
    values = dict(messages=messages, extra={"a": 10**15, "b": "text"}, nothing=[])
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    assert render(source, **values) == plain.from_string(source).render(**values)


def test_a_long_conversation_is_no_endless_one():
    """1,000 turns of 1,000 characters."""
    environment = Bounded()
    source = "{% for m in messages %}{{ '<' ~ m.role ~ '>' + m.content | trim }}{% endfor %}"
    template = environment.from_string(source)
    environment.render_bounded(template, dict(messages=[said("user", "x" * 1000)] * 1000))
    assert 1000 < environment.steps < sandbox.STEPS / 40


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("tokenizer_config.json", "[1]", "expected an object"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be text, found 3"),
        ("generation_config.json", '"x"', "expected an object"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, name, content, named):
    tokenizer = build(tmp_path, "{{ 1 }}", "<|im_end|>", NAMES)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"{name}: {named}"):
        type(tokenizer).load(tmp_path)
