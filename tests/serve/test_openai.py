"""The official client against a real server: whatever it can ask is answered in the types it expects."""

import json
import time
from contextlib import suppress

import httpx
import openai
import pytest
import torch

from inference.engine import Engine
from inference.generate import generate
from inference.sampling import Sampling
from tests.helpers.models import TOKENIZER as tokenizer
from tests.helpers.servers import CHAT, GREEDY, WEATHER, Parrot, expected, running, say, served
from tokenizer.chat import encode_chat

HELLO = [{"role": "user", "content": "你好, how are you?"}]
LONG_CALL = {"function": {"name": "x", "arguments": json.dumps({"x": "long " * 90_000})}}


# ---- chat


def test_a_chat_streamed_or_not(client, model):
    ids, reply, text = expected(model, HELLO)
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12)
    assert whole.choices[0].message.content == text and whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == ("stop" if len(reply) < 12 else "length")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), len(reply))
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-") and whole.model == "tiny"

    asked = dict(model="tiny", messages=HELLO, max_completion_tokens=12, stream=True)
    chunks = list(client.chat.completions.create(**asked, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == len(ids) - 1  # the second time it is known
    assert len({chunk.id for chunk in chunks}) == 1 and all(c.object == "chat.completion.chunk" for c in chunks)


def test_the_stream_ends_as_the_protocol_says(server):
    body = {"messages": HELLO, "max_tokens": 3, "stream": True}
    answer = httpx.post(server.url + "/v1/chat/completions", json=body)
    lines = answer.text.split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])
    assert not any("usage" in json.loads(line[6:]) for line in lines[:-2])
    answer = httpx.post(server.url + "/v1/chat/completions", json=body | {"stream_options": {"include_usage": True}})
    usages = [json.loads(line[6:])["usage"] for line in answer.text.split("\n\n")[:-2]]
    assert usages[:-1] == [None] * (len(usages) - 1) and usages[-1]["completion_tokens"]


def test_settings_that_turn_something_off(client, model):
    """As vLLM's and OpenAI's clients write them: all tokens, only the likeliest one, no stop word. And the newer name
    of the length counts where both are given."""
    _, reply, text = expected(model, HELLO)
    for more in (dict(extra_body={"top_k": -1}), dict(top_p=0, temperature=1), dict(stop=""), dict(stop=["", "\0no"])):
        answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, **more)
        assert answer.choices[0].message.content == text, more
    both = dict(max_tokens=2, max_completion_tokens=4)
    assert (
        client.chat.completions.create(model="tiny", messages=HELLO, **both).usage.completion_tokens == 4 < len(reply)
    )


def test_many_choices_with_a_seed(client, model):
    asked = dict(model="tiny", messages=HELLO, max_tokens=10, n=3, seed=7, temperature=1.5, top_p=1)
    first, again = (client.chat.completions.create(**asked) for _ in range(2))
    counted = client.chat.completions.create(**asked, logprobs=True)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) == 3
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [streamed[i] for i in range(3)] == texts
    ids, written = expected(model, HELLO)[0], sum(len(choice.logprobs.content) for choice in counted.choices)
    assert (counted.usage.prompt_tokens, counted.usage.completion_tokens) == (len(ids), written), (
        "the prompt counts once"
    )


def test_a_new_prompt_of_many_choices_is_not_said_to_be_known(client):
    """The others start from what the first one reads. The last one's count was told, of a prompt that counts once."""
    asked = dict(model="tiny", prompt=[*range(300, 200, -1)], max_tokens=1, n=3)
    found = [client.completions.create(**asked).usage.prompt_tokens_details.cached_tokens for _ in range(2)]
    assert found == [0, 99]


def test_stop_words_and_penalties_are_obeyed(client, model):
    _, _, text = expected(model, HELLO, 40)
    word = text[8:11]
    for stream in (False, True):
        answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=40, stop=[word], stream=stream)
        if stream:
            chunks = list(answer)
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            said, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert said == text[: text.index(word)] and reason == "stop"
    banned = {str(token): -100 for token in expected(model, HELLO)[1]}
    extra = dict(repetition_penalty=1.2, top_k=5, min_p=0.01)
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=12, logit_bias=banned, presence_penalty=1, extra_body=extra
    )
    assert answer.choices[0].message.content != text


def test_log_probabilities_of_a_chat(client, model):
    ids, reply, text = expected(model, HELLO)
    asked = dict(model="tiny", messages=HELLO, max_tokens=12, logprobs=True, top_logprobs=2)
    content = client.chat.completions.create(**asked).choices[0].logprobs.content
    with torch.no_grad():
        reference = model(torch.tensor([ids + reply])).logits[0].log_softmax(-1)
    assert b"".join(bytes(one.bytes) for one in content).decode("utf-8", "replace") == text
    for place, (one, token) in enumerate(zip(content, reply), len(ids) - 1):
        assert one.logprob == pytest.approx(float(reference[place, token]), abs=1e-3) and len(one.top_logprobs) == 2
        assert one.top_logprobs[0].logprob == one.logprob  # greedy: the likeliest
    streamed = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [one.token for one in streamed] == [one.token for one in content]


def test_log_probabilities_of_tokens_that_are_no_text_yet(client, parrot):
    """Each token of a character is sent by itself; those before the last one have nothing to show."""
    ids = tokenizer.encode("👩‍👧")
    assert len(ids) > 3
    say(parrot, "👩‍👧")
    parrot.seconds = 0.02
    chunks = list(client.chat.completions.create(model="parrot", messages=HELLO, logprobs=True, stream=True))
    parrot.seconds = 0.0
    told = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [bytes(one.bytes) for one in told] == tokenizer.bytes_of(ids)


# ---- thoughts and tools


def test_thoughts_and_the_ways_to_ask_for_them(client, parrot):
    say(parrot, "\nhm\n", "</think>", "\n\nyes")
    for extra in (
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"enable_thinking": True},
        {"chat_template_kwargs": {"open_thinking": True}, "reasoning_effort": "medium"},  # MiniMind's client
    ):
        asked = dict(model="parrot", messages=HELLO, extra_body=extra)
        message = client.chat.completions.create(**asked).choices[0].message
        assert (message.reasoning_content, message.content) == ("hm", "yes")
        deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hm"
        assert "".join(delta.content or "" for delta in deltas) == "yes"


def test_a_tool_is_called_and_its_result_sent_back(client, parrot):
    call = '\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
    say(parrot, "<tool_call>", call, "</tool_call>")
    asked = dict(model="parrot", messages=HELLO, tools=[WEATHER])
    answer = client.chat.completions.create(**asked)
    (tool,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
    assert (tool.function.name, json.loads(tool.function.arguments)) == ("get_weather", {"city": "Paris"})
    chunks = list(client.chat.completions.create(**asked, stream=True))
    (streamed,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert streamed.function.name == "get_weather" and streamed.function.arguments == tool.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"

    say(parrot, "Sunny.")
    result = {"role": "tool", "tool_call_id": tool.id, "content": "sunny"}
    history = [*HELLO, answer.choices[0].message.model_dump(exclude_none=True), result]
    assert client.chat.completions.create(model="parrot", messages=history).choices[0].message.content == "Sunny."
    canonical = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "get_weather", "arguments": {"city": "Paris"}}],
    }
    ids = encode_chat(
        tokenizer, [*HELLO, canonical, {"role": "tool", "content": "sunny"}], add_generation_prompt=True
    ).ids
    assert client.chat.completions.create(model="parrot", messages=history).usage.prompt_tokens == len(ids)


def test_arguments_that_are_not_json_are_text(client, parrot):
    """Python reads and writes NaN, and 1e999 as infinity. JSON has neither, and JavaScript's clients fail on them."""
    for value in ("NaN", "-Infinity", "1e999"):
        call = f'{{"name": "get_weather", "arguments": {{"city": {value}}}}}'
        say(parrot, "<tool_call>", call, "</tool_call>")
        message = client.chat.completions.create(model="parrot", messages=HELLO, tools=[WEATHER]).choices[0].message
        assert message.tool_calls is None and message.content == f"<tool_call>{call}</tool_call>"


def test_an_answer_of_blanks_may_be_sent_back(client):
    """Models say nothing but blanks now and then, and clients keep it in the history: it was status 400."""
    empty = [
        {"role": "assistant", "content": text} for text in ("", " \n", "\u3000", [{"type": "text", "text": " "}], None)
    ]
    empty += [
        {"role": "assistant", "content": "", key: " \n"} for key in ("reasoning_content", "reasoning", "thinking")
    ]
    count = lambda messages: (
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=1).usage.prompt_tokens
    )
    for message in empty:
        assert count([HELLO[0], message, HELLO[0]]) == count([HELLO[0], HELLO[0]])
    called = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    assert count([HELLO[0], called, HELLO[0]]) > count([HELLO[0], HELLO[0]])  # it was left out


def test_an_answer_about_a_tag_may_be_sent_back(server):
    """A </think> without a <think> was taken for the end of a thought that had lost its beginning, as in training data:
    the first answer here was status 400, and the others got a thought that nobody had."""
    tags = [tokenizer.control[tag] for tag in ("<think>", "</think>")]

    def ids(content, **more):
        history = [*HELLO, {"role": "assistant", "content": content, **more}, *HELLO]
        answer = httpx.post(server.url + "/tokenize", json={"messages": history})
        assert answer.status_code == 200, answer.text
        return answer.json()["tokens"]

    for words in (
        "The tag </think> closes a thought.",
        "Close it like this:\n</think>\nDone.",
        "</think>\n\n4",
        "2 and 2.</think>\n\n4",
    ):
        for content in (words, [{"type": "text", "text": words}]):
            found = ids(content)
            assert not set(tags) & set(found) and words in tokenizer.decode(found)
    thought = ids("a\n</think>\nb", reasoning_content="a")  # the thought is sent beside the words: these stay whole
    assert [thought.count(tag) for tag in tags] == [1, 1] and "a\n</think>\nb" in tokenizer.decode(thought)
    block = ids("<think>\na\n</think>\n\n</think> is a tag.")  # the one piece of markup
    assert [block.count(tag) for tag in tags] == [1, 1]


def test_a_demanded_tool_is_called(client, parrot):
    say(parrot, ' {"city": "Rome"}}\n', "</tool_call>")
    choice = {"type": "function", "function": {"name": "get_weather"}}
    asked = dict(model="parrot", messages=HELLO, tools=[WEATHER])
    (tool,) = client.chat.completions.create(**asked, tool_choice=choice).choices[0].message.tool_calls
    assert json.loads(tool.function.arguments) == {"city": "Rome"}
    second = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
    say(parrot, ' "get_weather", "arguments": {}}\n', "</tool_call>", "<tool_call>", second, "</tool_call>")
    for parallel, found in ((False, ["{}"]), (True, ["{}", '{"city": "Oslo"}'])):
        answer = client.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=parallel)
        assert [tool.function.arguments for tool in answer.choices[0].message.tool_calls] == found
    with pytest.raises(openai.BadRequestError, match="name a function among the tools"):
        client.chat.completions.create(**asked, tool_choice={"type": "function", "function": {"name": "other"}})


def test_the_prompt_of_a_demanded_tool(client, parrot, monkeypatch):
    """It ends with the beginning of a call, as a model is trained on it, and opens no thought before."""
    read, submit = [], Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda self, request: read.append(request.prompt) or submit(self, request))
    say(parrot, "x")
    asked = dict(model="parrot", messages=HELLO, tools=[WEATHER], tool_choice="required")
    for thinking in (True, False):
        client.chat.completions.create(**asked, extra_body={"enable_thinking": thinking})
    call = [tokenizer.control["<tool_call>"], *tokenizer.encode('\n{"name":')]
    assert read[0] == read[1] and read[0][-len(call) :] == call


# ---- completions


def test_a_text_is_continued(client, model):
    ids = [tokenizer.end_of_text, *tokenizer.encode("Once upon")]
    (reply,) = generate(model, [ids], GREEDY, max_new_tokens=9, stop=tokenizer.stop_ids)
    text = tokenizer.decode(reply, skip_control=True)
    answer = client.completions.create(model="tiny", prompt="Once upon", max_tokens=9)
    assert answer.choices[0].text == text and answer.object == "text_completion"
    both = client.completions.create(model="tiny", prompt=["Once upon", ids], max_tokens=9, echo=True)
    assert [c.text for c in both.choices] == ["Once upon" + text] * 2 and [c.index for c in both.choices] == [0, 1]
    stream = client.completions.create(model="tiny", prompt="Once upon", max_tokens=9, stream=True, echo=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Once upon" + text


def test_many_texts_are_continued(client, model):
    """Every text has the choices that it has alone; 16 tokens where nobody says how many, as OpenAI has it."""
    never = {str(token): -1000 for token in tokenizer.stop_ids}
    asked = dict(model="tiny", n=2, best_of=2, seed=3, temperature=1.5, top_p=1, logit_bias=never)
    answer = client.completions.create(**asked, prompt=["Once", "Twice", "Once"])
    texts = [choice.text for choice in answer.choices]
    assert (
        texts[4:] == texts[:2] == [choice.text for choice in client.completions.create(**asked, prompt="Once").choices]
    )
    read = 2 * len(tokenizer.encode("Once")) + len(tokenizer.encode("Twice")) + 3
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (read, 6 * 16) and len(set(texts)) == 4


def test_what_the_log_probabilities_of_a_text_leave_out(client, parrot):
    """The token that we put before a text, control tokens in its offsets, and what came after a stop word."""
    say(parrot, "one two")
    told = lambda **asked: client.completions.create(**asked, logprobs=1).choices[0]
    choice = told(model="parrot", prompt="x")
    assert choice.text == "one two" and "".join(choice.logprobs.tokens) == "one two<|im_end|>"
    choice = told(model="parrot", prompt="x", stop=" two")
    assert choice.text == "one" and "<|im_end|>" not in choice.logprobs.tokens
    choice = told(model="tiny", prompt="zero", echo=True, max_tokens=0)
    assert choice.text == "zero" == "".join(choice.logprobs.tokens)
    ids = [tokenizer.control["<|im_start|>"], *tokenizer.encode("zero")]
    choice = told(model="tiny", prompt=ids, echo=True, max_tokens=0)
    assert choice.text == "zero" and choice.logprobs.tokens[0] == "<|im_start|>"
    assert choice.logprobs.text_offset[:2] == [0, 0]


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"prompt": []}, "at least one"),
        ({"prompt": [tokenizer.vocab_size]}, "token ids from 0 to"),
        ({"best_of": 2}, "best_of: is not supported"),
        ({"suffix": "x"}, "suffix: is not supported"),
    ],
)
def test_mistakes_in_a_text_are_told(client, changes, complaint):
    with pytest.raises(openai.BadRequestError, match=complaint):
        client.completions.create(**{"model": "tiny", "prompt": "x", "max_tokens": 1, **changes})


def test_the_likelihood_of_a_text_as_lm_evaluation_harness_asks_for_it(client, model):
    """It sends token ids of context and continuation, echo and logprobs, for one new token; and then reads
    token_logprobs[len(context):-1], and whether each is the greatest of top_logprobs."""
    context, rest = tokenizer.encode("The capital of"), tokenizer.encode(" France is Paris")
    rows = [context + rest, context + generate(model, [context], GREEDY, max_new_tokens=4)[0]]
    asked = dict(model="tiny", prompt=rows, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234)
    answer = client.completions.create(**asked)
    for row, choice, greedy in zip(rows, sorted(answer.choices, key=lambda c: c.index), (False, True)):
        with torch.no_grad():
            reference = model(torch.tensor([row])).logits[0].log_softmax(-1)
        found = choice.logprobs.token_logprobs
        assert found[0] is None and len(found) == len(row) + 1 == len(choice.logprobs.tokens)
        wanted = [float(reference[place, row[place + 1]]) for place in range(len(context) - 1, len(row) - 1)]
        assert found[len(context) : -1] == pytest.approx(wanted, abs=1e-3)
        best = [max(top.values()) for top in choice.logprobs.top_logprobs[len(context) : -1]]
        assert (found[len(context) : -1] == best) is greedy
        listed = zip(choice.logprobs.tokens[1:], found[1:], choice.logprobs.top_logprobs[1:])
        assert all(top[token] == value for token, value, top in listed), "also where it is not the likeliest"
        assert choice.text.startswith(tokenizer.decode(row))
        pieces = zip(choice.logprobs.tokens, choice.logprobs.text_offset)
        assert all(choice.text[at:].startswith(token) for token, at in pieces if not token.startswith("bytes:"))
    streamed = list(client.completions.create(**asked, stream=True))
    together = [
        p for chunk in streamed if chunk.choices[0].index == 0 for p in chunk.choices[0].logprobs.token_logprobs
    ]
    assert together == answer.choices[0].logprobs.token_logprobs
    silent = client.completions.create(model="tiny", prompt=rows[0], max_tokens=0, logprobs=1, echo=True)
    assert len(silent.choices[0].logprobs.tokens) == len(rows[0]) and silent.choices[0].text == tokenizer.decode(
        rows[0]
    )


# ---- the table, tokens, errors


def test_models_are_listed_and_chosen(client):
    assert [model.id for model in client.models.list()] == ["tiny", "parrot"]
    assert client.models.retrieve("parrot").owned_by == "sparrow"
    for name in ("minimind", "minimind-local:latest"):  # MiniMind's clients: the first model
        assert client.chat.completions.create(model=name, messages=HELLO, max_tokens=2).model == name
    for name in ("gpt-4o", "../out/full_sft_512.pth", "\x1b[31m"):
        with pytest.raises(openai.NotFoundError) as error:
            client.chat.completions.create(model=name, messages=HELLO)
        assert error.value.code == "model_not_found" and error.value.param == "model"


def test_content_in_parts_and_other_roles(client):
    parts = [{"type": "text", "text": "你好, "}, {"type": "text", "text": "how are you?"}]
    ask = lambda messages: client.chat.completions.create(model="tiny", messages=messages, max_tokens=5)
    assert ask(HELLO).usage.prompt_tokens == ask([{"role": "user", "content": parts}]).usage.prompt_tokens
    developer = [{"role": "developer", "content": "Be brief."}, *HELLO]
    system = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert ask(developer).choices[0].message.content == ask(system).choices[0].message.content
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(openai.BadRequestError, match="only text can be read"):
        ask(image)


def test_tokens_there_and_back(server):
    post = lambda path, body: httpx.post(server.url + path, json=body).json()
    text = "你好 <|im_end|> 👩"
    found = post("/tokenize", {"prompt": text})
    assert found == {"tokens": tokenizer.encode(text), "count": len(tokenizer.encode(text)), "max_model_len": 512}
    assert post("/detokenize", {"tokens": found["tokens"]}) == {"prompt": text}
    chat = post("/tokenize", {"messages": HELLO})
    assert chat["tokens"] == encode_chat(tokenizer, HELLO, add_generation_prompt=True).ids
    assert "error" in post("/tokenize", {})
    assert "there is no 99999" in post("/detokenize", {"tokens": [5, 99999]})["error"]["message"], "not left out"
    assert post("/detokenize", {"tokens": []}) == {"prompt": ""}


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, r"messages\[0\]: role must be one of"),
        ({"messages": [{"role": "user"}]}, "content must be text"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "every message is empty"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"n": 100}, "n: Input should be less than or equal to 16"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"999999": 1}}, "logit_bias: 999999 is no token"),
        ({"response_format": {"type": "json_object"}}, "only text is supported"),
        ({"stop": ["x"] * 17}, "stop: at most 16"),
        ({"messages": [{"role": "user", "content": "long " * 600}]}, "maximum context length is 512 tokens"),
        (
            {"messages": [{"role": "user", "content": "long " * 90_000}]},
            "and the prompt has more than",
        ),  # not tokenised
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [LONG_CALL]}]},
            "and the prompt has more than",
        ),
    ],
)
def test_mistakes_are_told_in_openais_form(client, changes, complaint):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=complaint) as error:
            client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "stream": stream, **changes})
        assert error.value.type == "invalid_request_error" and error.value.body["message"]
    if "long" in str(changes):
        assert error.value.code == "context_length_exceeded"


def test_curl_without_its_header_is_told_which_one(server):
    """`curl -d` says that it sends a form: the answer was "Input should be a valid dictionary"."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = httpx.post(server.url + "/v1/chat/completions", content='{"messages": []}', headers=form)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "body: expected JSON with the header Content-Type: application/json"


def test_what_is_not_json_is_told_where(server):
    """The answer was "14: JSON decode error", with 14 as the parameter."""
    sent = dict(content='{"messages": [', headers={"Content-Type": "application/json"})
    error = httpx.post(server.url + "/v1/chat/completions", **sent).json()["error"]
    assert error["message"] == "body: not JSON: Expecting value, at character 14" and error["param"] is None


def test_other_paths_and_methods(server):
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/", 405)):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    for path in ("/", "/health"):  # curl -I, proxies
        answer = httpx.head(server.url + path)
        assert answer.status_code == 200 and answer.content == b"" and int(answer.headers["content-length"]) > 10


@pytest.mark.parametrize("stream", (True, False))
def test_what_was_written_for_those_who_left_is_counted(model, stream):
    """Of a stream that its reader left, nothing was counted. Of other answers also their time was, which had no end."""
    parrot = Parrot(model.config)
    parrot.seconds = 0.02
    say(parrot, "on and on " * 50)
    with running(served(parrot, rows=1)) as server:
        asked = dict(json={"messages": HELLO, "stream": stream}, timeout=0.5)
        with suppress(httpx.TimeoutException), httpx.stream("POST", server.url + CHAT, **asked):
            time.sleep(0.5)
        metrics = server.state.metrics
        for _ in range(500):
            if metrics.responses:
                break
            time.sleep(0.01)
        assert metrics.tokens["generated"] > 0 and metrics.request.count == 0


def test_health_and_metrics(server, client):
    client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3)
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    text = httpx.get(server.url + "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['sparrow_responses_total{path="/v1/chat/completions",status="200"}']) >= 1
    assert float(values['sparrow_tokens_total{kind="generated"}']) >= 3
    assert values['sparrow_first_token_seconds_bucket{le="+Inf"}'] == values["sparrow_first_token_seconds_count"]
    assert values['sparrow_sequences_running{model="tiny"}'] == "0"


def test_sampling_defaults_are_the_servers(model):
    with running(served(model), defaults=Sampling(temperature=0)) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="any")
        said = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12)
        assert said.choices[0].message.content == expected(model, HELLO)[2]
