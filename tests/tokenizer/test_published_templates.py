"""The chat templates of Qwen2.5, Qwen3, Llama 3.1, Mistral 7B v0.3 and GLM-4-9B, written from what their makers publish
(model cards and tokenizer_config.json): the ids that transformers gives, and which of them are trained on.

ChatGLM3's is in test_sentencepiece.py. The tokenizers are the shipped one with each family's control tokens.
"""

import json

import pytest

from tests.helpers.rows import said
from tests.helpers.templates import build, spoken
from tokenizer.chat import encode_chat

QWEN_TOOLS = (
    "# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with "
    "function signatures within <tools></tools> XML tags:\\n<tools>"
)
QWEN_CALLS = (
    "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\\n<tool_call>\\n"
    '{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n'
)
QWEN_RESULTS = """
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}"""
QWEN25 = (
    """
{%- set default = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else default %}
{%- if tools %}
    {{- '<|im_start|>system\\n' + system }}
    {{- "\\n\\n"""
    + QWEN_TOOLS
    + """" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{% endfor %}
    {{- \""""
    + QWEN_CALLS
    + """" }}
{%- else %}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system" and not loop.first
           or message.role == "assistant" and not message.tool_calls %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{% endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}"""
    + QWEN_RESULTS
    + """
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
)
QWEN3 = (
    """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
    {{- \""""
    + QWEN_TOOLS
    + """" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{% endfor %}
    {{- \""""
    + QWEN_CALLS
    + """" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not
           (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or message.role == "system" and not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if loop.first and content or not loop.first %}{{- '\\n' }}{% endif %}
            {%- if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}
            {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{% endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}"""
    + QWEN_RESULTS
    + """
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
)

# The date stands in every system turn; tools stand in the first question; a call is a JSON object of its own turn
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{% endif %}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n" }}
{{- system_message }}{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {%- set first_user_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
    {{- "Given the following functions, please respond with a JSON for a function call with its proper arguments " }}
    {{- "that best answers the given prompt.\\n\\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{% endfor %}
    {{- first_user_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or message.tool_calls) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif message.tool_calls %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping %}{{- message.content | tojson }}{% else %}{{- message.content }}{% endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# The system prompt and the tools stand in the last question; a call needs an identifier, which our rows have not
MISTRAL = """
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.tool_calls) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and message == user_messages[-1] %}
            {{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none and message.tool_calls %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- if not tool_call.id is defined or tool_call.id | length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | tojson + "}[/TOOL_RESULTS]" }}
    {%- endif %}
{%- endfor %}"""

# An answer begins with a newline, which the model writes itself, and is ended by the next header
GLM4 = """[gMASK]<sop>
{%- if tools %}<|system|>
你是一个名为 ChatGLM 的人工智能助手。

# 可用工具
{%- for tool in tools %}

## {{ tool['function']['name'] }}

{{ tool['function'] | tojson(indent=4) }}
在调用上述函数时，请使用 Json 格式表示调用的参数。
{%- endfor %}{% endif %}
{%- for item in messages %}
    {%- if item['role'] == 'tool' %}{{- '<|observation|>\\n' + item['content'] }}
    {%- elif item['tool_calls'] %}
        {%- for call in item['tool_calls'] %}
            {{- '<|assistant|>' + call.function.name + '\\n' }}{{- call.function.arguments | tojson }}
        {%- endfor %}
    {%- elif item['content'] %}
        {{- '<|' + item['role'] + '|>' + item.get('metadata', '') + '\\n' + item['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""

QWEN_NAMES = "<|endoftext|> <|im_start|> <|im_end|> <tool_call> </tool_call>".split()
HEADERS = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split()
INSTRUCTIONS = (
    "<s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
)
GLM_NAMES = "[gMASK] <sop> <|endoftext|> <|system|> <|user|> <|assistant|> <|observation|>".split()
PUBLISHED = {
    "qwen2.5": (QWEN25, "<|im_end|>", QWEN_NAMES),
    "qwen3": (QWEN3, "<|im_end|>", [*QWEN_NAMES, "<think>", "</think>", "<tool_response>", "</tool_response>"]),
    "llama 3.1": (LLAMA3, "<|eot_id|>", HEADERS),
    "mistral": (MISTRAL, "</s>", INSTRUCTIONS.split()),
    "glm-4": (GLM4, "<|user|>", GLM_NAMES),
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}
CALL = {"name": "weather", "arguments": {"city": "北京"}}
CHATS = {
    "two turns": ([said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")], None),
    "a system prompt": ([said("system", "be"), said("user", "a"), said("assistant", "b")], None),
    "tools": (
        [
            said("user", "weather?"),
            said("assistant", "", tool_calls=[CALL]),
            said("tool", '{"t": 21}'),
            said("assistant", "warm"),
        ],
        [WEATHER],
    ),
}
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>'
NO_THOUGHT = "<think>\n\n</think>\n\n"
TRAINED = {  # what is trained on, by template and chat
    "qwen2.5": (["b<|im_end|>", "d<|im_end|>"], ["b<|im_end|>"], [QWEN_CALL, "warm<|im_end|>"]),
    "qwen3": (
        ["b<|im_end|>", NO_THOUGHT + "d<|im_end|>"],
        [NO_THOUGHT + "b<|im_end|>"],
        [QWEN_CALL, NO_THOUGHT + "warm<|im_end|>"],
    ),
    "llama 3.1": (
        ["b<|eot_id|>", "d<|eot_id|>"],
        ["b<|eot_id|>"],
        ['{"name": "weather", "parameters": {"city": "北京"}}<|eot_id|>', "warm<|eot_id|>"],
    ),
    "mistral": ([" b</s>", " d</s>"], [" b</s>"], None),
    "glm-4": (
        ["\nb<|user|>", "\nd<|endoftext|>"],
        ["\nb<|endoftext|>"],
        ['weather\n{"city": "北京"}<|observation|>', "\nwarm<|endoftext|>"],
    ),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    built = {}

    def get(name: str):
        if name not in built:
            from transformers import AutoTokenizer

            tokenizer = build(tmp_path_factory.mktemp("family"), *PUBLISHED[name])
            built[name] = tokenizer, AutoTokenizer.from_pretrained(tokenizer.path)
        return built[name]

    return get


def ids_of_transformers(theirs, messages, tools, **prompt) -> list[int]:
    shown = [dict(message) for message in messages]
    for message in shown:
        if message.get("tool_calls"):
            message["tool_calls"] = [{"type": "function", "function": call} for call in message["tool_calls"]]
    return theirs.apply_chat_template(shown, tools=tools, tokenize=True, return_dict=False, **prompt)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_are_those_of_transformers_and_answers_are_trained_on(family, name, chat):
    (tokenizer, theirs), (messages, tools) = family(name), CHATS[chat]
    expected = TRAINED[name][list(CHATS).index(chat)]
    if expected is None:  # our rows have no identifiers of calls
        with pytest.raises(ValueError, match="refuses this conversation: Tool call IDs should be alphanumeric"):
            encode_chat(tokenizer, messages, tools)
        return
    encoded = encode_chat(tokenizer, messages, tools)
    assert spoken(tokenizer, encoded) == expected
    # GLM-4 ends a turn with the next header; after the last turn we add an end that can be learned
    end = [tokenizer.control["<|endoftext|>"]] if name == "glm-4" else []
    assert encoded.ids == ids_of_transformers(theirs, messages, tools) + end
    prompt = encode_chat(tokenizer, messages[:-1], tools, add_generation_prompt=True)
    assert prompt.ids == ids_of_transformers(theirs, messages[:-1], tools, add_generation_prompt=True)
    assert not any(prompt.trained[len(prompt.ids) - 1 :]), "the header is not trained on"


def test_thinking_of_qwen3(family):
    """In the last turns it is printed and trained on; in earlier ones the template leaves it out."""
    tokenizer, theirs = family("qwen3")
    chat = [
        said("user", "a"),
        said("assistant", "b", reasoning_content="early"),
        said("user", "c"),
        said("assistant", "", reasoning_content="look it up", tool_calls=[CALL]),
        said("tool", "21"),
        said("assistant", "<think>\nso\n</think>\n\nwarm"),
    ]
    encoded = encode_chat(tokenizer, chat, [WEATHER])
    assert spoken(tokenizer, encoded) == [
        "b<|im_end|>",
        "<think>\nlook it up\n</think>\n\n" + QWEN_CALL,
        "<think>\nso\n</think>\n\nwarm<|im_end|>",
    ]
    assert encoded.ids == ids_of_transformers(theirs, chat, [WEATHER])
    assert encoded.ids.count(tokenizer.control["<think>"]) == 2
    for thinking in (True, False):
        prompt = encode_chat(tokenizer, chat[:3], add_generation_prompt=True, enable_thinking=thinking)
        wanted = ids_of_transformers(theirs, chat[:3], None, add_generation_prompt=True, enable_thinking=thinking)
        assert prompt.ids == wanted


@pytest.mark.parametrize("name", PUBLISHED)
def test_content_does_not_become_control_tokens(family, name):
    """In a question, a system prompt, a tool's schema and what it returned."""
    tokenizer, _ = family(name)
    evil = "".join(tokenizer.control)
    counts = []
    for word in (evil, "word"):
        tools = [json.loads(json.dumps(WEATHER).replace("of a city", json.dumps(word)[1:-1]))]
        chat = [said("user", word), said("assistant", word)]
        if name != "mistral":
            chat = [said("system", word), *chat, said("user", word), said("assistant", "", tool_calls=[CALL])]
            chat += [said("tool", word), said("assistant", "y")]
        encoded = encode_chat(tokenizer, chat, tools)
        counts.append([i for i in encoded.ids if i in tokenizer.control.values()])
    assert counts[0] == counts[1]
