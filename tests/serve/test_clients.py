"""Clients as people use them: OpenAI's, with every call and its own helpers, and MiniMind's loop."""

import asyncio
import copy
from dataclasses import replace

import httpx
import openai
import pytest

from tests.helpers.models import TOKENIZER
from tests.helpers.servers import WEATHER, expected, running, say, served

HELLO = [{"role": "user", "content": "你好, how are you?"}]


def test_the_asynchronous_client_and_many_at_once(server, model):
    questions = [[{"role": "user", "content": f"question {n} " * (n + 1)}] for n in range(9)]

    async def ask():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as client:

            async def one(messages):
                stream = await client.chat.completions.create(
                    model="tiny", messages=messages, max_tokens=12, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, questions))

    assert asyncio.run(ask()) == [expected(model, question)[2] for question in questions]


def test_every_call_of_the_asynchronous_client(server, model, parrot):
    say(parrot, "Fine.")  # ends by itself: the client's helper demands it

    async def ask():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as client:
            assert [one.id async for one in client.models.list()] == ["tiny", "parrot"]
            assert (await client.models.retrieve("tiny")).id == "tiny"
            chat = dict(model="tiny", messages=HELLO, max_tokens=12)
            answer = await client.chat.completions.create(**chat)
            assert answer.choices[0].message.content == expected(model, HELLO)[2]
            async with client.chat.completions.stream(model="parrot", messages=HELLO) as stream:
                kinds = {event.type async for event in stream}
                final = await stream.get_final_completion()
            assert final.choices[0].message.content == "Fine."
            assert {"chunk", "content.delta", "content.done"} <= kinds
            text = dict(model="tiny", prompt="Once upon", max_tokens=9)
            whole = (await client.completions.create(**text)).choices[0].text
            stream = await client.completions.create(**text, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == whole
            raw = await client.chat.completions.with_raw_response.create(**chat)
            assert raw.headers["content-type"] == "application/json" and raw.parse().object == "chat.completion"
            async with client.chat.completions.with_streaming_response.create(**chat) as streamed:
                assert (await streamed.parse()).usage.completion_tokens == len(expected(model, HELLO)[1])
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(**(chat | {"messages": []}))
            for missing in (client.embeddings.create(model="tiny", input="x"), client.responses.create(input="x")):
                with pytest.raises(openai.NotFoundError) as error:
                    await missing
                assert error.value.type == "invalid_request_error"

    asyncio.run(ask())


def test_the_clients_own_reading_of_a_stream(client, parrot):
    """Its helper joins the deltas, and checks the arguments against the schema."""
    call = '\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
    say(parrot, "Let me see.\n", "<tool_call>", call, "</tool_call>")
    strict = WEATHER["function"] | {"strict": True}
    with client.chat.completions.stream(
        model="parrot", messages=HELLO, tools=[{"type": "function", "function": strict}]
    ) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert message.content == "Let me see." and "tool_calls.function.arguments.done" in kinds
    assert message.tool_calls[0].function.parsed_arguments == {"city": "Paris"}


def test_minimind_s_client_as_it_is(client, model):
    """Its loop: the last messages of the history, streamed, `delta.content or ""` of every chunk."""
    history = []
    for query in ("hello", "and then?"):
        history.append({"role": "user", "content": query})
        response = client.chat.completions.create(
            model="minimind", messages=history[-2:], stream=True, temperature=0, max_tokens=12, top_p=0.9
        )
        answer = ""
        for chunk in response:
            answer += chunk.choices[0].delta.content or ""
        assert answer == expected(model, history[-2:])[2]
        history.append({"role": "assistant", "content": answer})


def test_a_model_whose_template_has_no_place_for_tools_says_so(model):
    """Its template would leave them out, and the model would answer as if nobody had offered any."""
    plain = copy.copy(TOKENIZER)
    plain.chat_template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    with running(replace(served(model), tokenizer=plain)) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)
        asked = dict(model="tiny", messages=HELLO, max_tokens=3)
        assert client.chat.completions.create(**asked).usage.completion_tokens
        assert client.chat.completions.create(**asked, tools=[WEATHER], tool_choice="none").usage.completion_tokens
        with pytest.raises(openai.BadRequestError, match="no place for them") as error:
            client.chat.completions.create(**asked, tools=[WEATHER])
        assert error.value.param == "tools"
        body = {"messages": HELLO, "tools": [WEATHER]}
        assert httpx.post(server.url + "/tokenize", json=body).status_code == 400
