"""One conversation and one preference in every layout that is read, beside the canonical row."""

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "be"}
ONE = [USER, ANSWER]
TWO = [USER, ANSWER, {"role": "user", "content": "ok?"}, {"role": "assistant", "content": "no"}]
ADD = {"name": "add", "arguments": {"a": 1}}
TOOLS = [{"type": "function", "function": {"name": "add"}}]
GPT_TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]

CHATS = {
    "openai": ({"messages": ONE}, ONE),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                {"role": "assistant", "content": [{"type": "text", "value": "yo"}]},
            ]
        },
        ONE,
    ),
    "minimind": ({"conversations": ONE}, ONE),
    "human and assistant as roles": ({"conversations": [{"role": "human", "content": "hi"}, ANSWER]}, ONE),
    "sharegpt": ({"conversations": GPT_TURNS, "system": "be"}, [SYSTEM, *ONE]),
    "sharegpt, its system a turn": ({"conversations": [{"from": "system", "value": "be"}, *GPT_TURNS]}, [SYSTEM, *ONE]),
    "human/assistant": (
        {"system": "be", "conversation": [{"human": "hi", "assistant": "yo"}, {"human": "ok?", "assistant": "no"}]},
        [SYSTEM, *TWO],
    ),
    "xtuner": ({"conversation": [{"system": "be", "input": "hi", "output": "yo"}]}, [SYSTEM, *ONE]),
    "alpaca": ({"instruction": "hi", "input": "", "output": "yo"}, ONE),
    "alpaca with input": (
        {"instruction": "Add.", "input": "1+1", "output": "2"},
        [{"role": "user", "content": "Add.\n1+1"}, {"role": "assistant", "content": "2"}],
    ),
    "alpaca with history": (
        {"instruction": "ok?", "output": "no", "history": [["hi", "yo"]], "system": "be"},
        [SYSTEM, *TWO],
    ),
    "alpaca, its own text beside it": ({"instruction": "hi", "input": None, "output": "yo", "text": "### hi yo"}, ONE),
    "prompt/completion": ({"prompt": "hi", "completion": "yo"}, ONE),
    "prompt/completion in messages": ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, *ONE]),
    "query/response": ({"query": "ok?", "response": "no", "history": [["hi", "yo"]]}, TWO),
    "question/answer": ({"question": "hi", "answer": "yo"}, ONE),
    "reasoning beside the answer": (
        {"question": "hi", "answer": "yo", "reasoning_content": "hm"},
        [USER, ANSWER | {"reasoning_content": "hm"}],
    ),
    "reasoning in a turn": (
        {"messages": [USER, ANSWER | {"thinking": "hm"}]},
        [USER, ANSWER | {"reasoning_content": "hm"}],
    ),
    "reasoning in parts": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "yo"}],
                },
            ]
        },
        [USER, ANSWER | {"reasoning_content": "hm"}],
    ),
}

BAD = {"role": "assistant", "content": "go"}
PAIRS = {
    "full conversations": {"chosen": ONE, "rejected": [USER, BAD]},
    "a prompt and text": {"prompt": "hi", "chosen": "yo", "rejected": "go"},
    "a prompt and messages": {"prompt": [USER], "chosen": [ANSWER], "rejected": [BAD]},
    "a prompt, and again in front": {"prompt": "hi", "chosen": ONE, "rejected": [USER, BAD], "messages": ONE},
    "question": {"question": "hi", "chosen": "yo", "rejected": "go"},
    "alpaca": {"instruction": "hi", "input": "", "chosen": "yo", "rejected": "go"},
    "alpaca's older names": {"instruction": "hi", "response_chosen": "yo", "response_rejected": "go"},
    "sharegpt": {"conversations": GPT_TURNS[:1], "chosen": GPT_TURNS[1], "rejected": {"from": "gpt", "value": "go"}},
    "conversations and text": {"conversations": [USER], "chosen": "yo", "rejected": "go"},
    "human/assistant": {"conversation": [{"role": "human", "content": "hi"}], "chosen": "yo", "rejected": "go"},
}
