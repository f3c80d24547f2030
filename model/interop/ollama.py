"""A Modelfile, with which ollama makes a model of a GGUF file: `ollama create NAME -f small.Modelfile`.

Its template is in Go's language (github.com/ollama/ollama, docs/template.md and docs/modelfile.md). It is written for
ChatML, our own format; for others ollama goes by the chat template in the GGUF file. By the first text below
`if .ToolCalls` ollama recognises a call in an answer.
"""

from __future__ import annotations

from tokenizer.chat import TEMPLATE
from tokenizer.text import IM_END, IM_START, TEXT_ENDS, TURN_ENDS, Tokenizer

CHATML = """{{- if or .System .Tools }}<|im_start|>system
{{- if .System }}
{{ .System }}
{{- end }}
{{- if .Tools }}{{ if .System }}
{{ end }}
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{{- range .Tools }}
{"type": "function", "function": {{ .Function }}}
{{- end }}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>
{{- end }}<|im_end|>
{{ end }}
{{- $before := "" }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- $next := "" }}
{{- if not $last }}{{ with index (slice $.Messages $i) 1 }}{{ $next = .Role }}{{ end }}{{ end }}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}
{{- if .Content }}{{ with .ToolCalls }}
{{ end }}{{ end }}
{{- if .ToolCalls }}<tool_call>
{{ range $n, $_ := .ToolCalls }}{{ if $n }}
</tool_call>
<tool_call>
{{ end }}{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
{{- end }}
</tool_call>
{{- end }}
{{- if not $last }}<|im_end|>
{{ end }}
{{- else if eq .Role "tool" }}{{ if ne $before "tool" }}<|im_start|>user{{ end }}
<tool_response>
{{ .Content }}
</tool_response>{{ if ne $next "tool" }}<|im_end|>
{{ end }}
{{- end }}
{{- $before = .Role }}
{{- if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}
{{- end }}"""


def modelfile(weights: str, tokenizer: Tokenizer) -> str:
    """weights: the GGUF file's name, which lies beside."""
    lines = [f"FROM ./{weights}"]
    if tokenizer.chat_template in (None, TEMPLATE) and IM_START in tokenizer.control:
        lines.append(f'TEMPLATE """{CHATML}"""')
    ends = [name for name in (IM_START, IM_END, *TURN_ENDS, *TEXT_ENDS) if name in tokenizer.control]
    ends += [name for name, number in tokenizer.control.items() if number in tokenizer.stop_ids]
    lines += [f'PARAMETER stop "{name}"' for name in dict.fromkeys(ends)]
    return "\n".join(lines) + "\n"
