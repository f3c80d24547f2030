"""The template of a Modelfile, by the language that ollama reads it in (where there is a Go compiler), against ours."""

import json
import re
import shutil
import subprocess

import pytest
from jinja2 import Environment

from model.interop.ollama import CHATML
from tokenizer.chat import TEMPLATE

# What ollama hands to a template (api/types.go, template/template.go): arguments and functions print as JSON
RENDER = """
package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Arguments map[string]any
func (a *Arguments) String() string { text, _ := json.Marshal(a); return string(text) }
type Call struct { Function struct { Name string; Arguments Arguments } }
type Message struct { Role, Content string; ToolCalls []Call `json:"tool_calls"` }
type Function struct { Name string `json:"name"`; Parameters map[string]any `json:"parameters"` }
func (f *Function) String() string { text, _ := json.Marshal(f); return string(text) }
type Tool struct { Type string; Function Function }

func main() {
    source, _ := os.ReadFile(os.Args[1])
    parsed := template.Must(template.New("").Option("missingkey=zero").Parse(string(source)))
    var chats []struct { Messages []*Message; Tools []Tool }
    if err := json.NewDecoder(os.Stdin).Decode(&chats); err != nil { panic(err) }
    var texts []string
    for _, chat := range chats {
        system := ""
        for _, message := range chat.Messages { if message.Role == "system" { system = message.Content } }
        var out strings.Builder
        values := map[string]any{"System": system, "Messages": chat.Messages, "Tools": chat.Tools}
        if err := parsed.Execute(&out, values); err != nil { panic(err) }
        texts = append(texts, out.String())
    }
    json.NewEncoder(os.Stdout).Encode(texts)
}
"""


def said(role, content, *calls):
    calls = [dict(function=dict(name="f", arguments=arguments)) for arguments in calls]
    return dict(role=role, content=content, **(dict(tool_calls=calls) if calls else {}))


SYSTEM, USER, ONE, TWO = said("system", "s"), said("user", "hi"), said("tool", "1"), said("tool", "2")
TOOL = dict(type="function", function=dict(name="f", parameters=dict(type="object")))
CHATS = [
    ([USER], []),
    ([SYSTEM, USER, said("assistant", "b"), USER], []),
    ([USER], [TOOL]),
    ([SYSTEM, USER], [TOOL, TOOL]),
    ([USER, said("assistant", "", {"x": 1}), ONE], [TOOL]),
    ([USER, said("assistant", "let me see", {"x": 1}, {"x": 2}), ONE, TWO], [TOOL]),
    ([USER, said("assistant", "", {}, {"x": 2}), ONE, TWO, said("assistant", "done"), USER], [TOOL]),
]


@pytest.mark.skipif(not shutil.which("go"), reason="no Go compiler")
def test_it_writes_what_our_template_writes(tmp_path):
    (tmp_path / "main.go").write_text(RENDER, encoding="utf-8")
    (tmp_path / "template").write_text(CHATML, encoding="utf-8")
    chats = json.dumps([dict(messages=messages, tools=tools) for messages, tools in CHATS])
    command = ["go", "run", "main.go", tmp_path / "template"]
    done = subprocess.run(command, cwd=tmp_path, input=chats, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    jinja = Environment()
    jinja.policies["json.dumps_kwargs"] = dict(separators=(",", ":"))  # as Go writes JSON
    ours = jinja.from_string(TEMPLATE)
    for (messages, tools), found in zip(CHATS, json.loads(done.stdout)):
        expected = ours.render(messages=messages, tools=tools, add_generation_prompt=True)
        assert found.replace('"function", "function": ', '"function","function":').replace('{"type": ', '{"type":') == (
            expected
        )


def test_what_it_asks_for_is_there():
    """Of `$`, the root, only what ollama puts there: a message's content is `.Content`. Go takes every other name for
    nothing, without a word."""
    assert set(re.findall(r"\$\.(\w+)", CHATML)) <= {"System", "Messages", "Tools"}


def test_a_call_in_an_answer_is_recognised():
    """ollama (tools/template.go) takes the text right behind `if .ToolCalls`, up to the first brace."""
    assert "{{- if .ToolCalls }}<tool_call>\n{{" in CHATML
