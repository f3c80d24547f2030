"""Texts for a model with Llama 2's tokenizer: they begin with its BOS, and what is continued keeps its first blank."""

import httpx
import pytest

from serve.completions import _prompt_ids
from tests.helpers.models import tiny_model
from tests.helpers.servers import Parrot, running, served
from tests.helpers.tokenizers import BEGINS, ENDS, glm_like, llama_like

PROMPT, GOES_ON = "the cat", " sat on the mat"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return llama_like(tmp_path_factory.mktemp("llama"), "the", "cat", "sat", "on", "mat")


@pytest.fixture(scope="module")
def ask(llama):
    """A parrot that answers every prompt with GOES_ON. Its `tiny` neighbour has weights of its own."""
    model = tiny_model(vocab_size=llama.vocab_size).eval()
    parrot = Parrot(model.config)
    parrot.script = [*llama.encode(GOES_ON.strip()), ENDS]
    with running(served(parrot, "parrot", 1, tokenizer=llama), served(model, tokenizer=llama)) as server:

        def ask(**body):
            body = {"model": "parrot", "prompt": PROMPT, "max_tokens": 9} | body
            return httpx.post(server.url + "/v1/completions", json=body).raise_for_status().json()

        yield ask


def test_a_text_begins_with_bos(ask, llama):
    """With </s>, as it did, the numbers are others. Token ids are taken as they are: their BOS does not come twice."""
    ids = llama.encode(PROMPT)
    told = lambda prompt: ask(model="tiny", prompt=prompt, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    values = lambda prompt: told(prompt)["logprobs"]["token_logprobs"][-len(ids) :]
    assert values(PROMPT) == pytest.approx(values([BEGINS, *ids]), abs=1e-4)
    assert values(PROMPT) != pytest.approx(values([ENDS, *ids]), abs=1e-2)
    assert ask(prompt=[BEGINS, *ids])["usage"]["prompt_tokens"] == len(ids) + 1 == ask()["usage"]["prompt_tokens"]


@pytest.mark.parametrize("echo", [False, True])
def test_a_text_goes_on_with_its_blank(ask, echo):
    """It was "the catsat on the mat", and the offsets of its tokens did not fit it."""
    choice = ask(echo=echo, logprobs=0)["choices"][0]
    assert choice["text"] == (PROMPT if echo else "") + GOES_ON
    told = choice["logprobs"]
    pieces = [(at, token) for at, token in zip(told["text_offset"], told["tokens"]) if token != "</s>"]
    pieces = [(0, token.lstrip()) if echo and not n else (at, token) for n, (at, token) in enumerate(pieces)]
    assert all(choice["text"][at : at + len(token)] == token for at, token in pieces)
    assert len(pieces) == len(choice["text"].split())


def test_a_stop_word_may_begin_with_the_blank(ask):
    assert ask(stop=" sat")["choices"][0]["text"] == ""
    assert ask(stop="sat")["choices"][0]["text"] == " "


def test_where_nothing_stands_before_it_a_text_has_no_blank(ask):
    assert ask(prompt="")["choices"][0]["text"] == GOES_ON.strip()


def test_all_that_opens_a_text_is_hidden(tmp_path):
    """GLM's two tokens, which echo must not tell as the client's."""
    glm = glm_like(tmp_path)
    there = served(tiny_model(vocab_size=glm.vocab_size).eval(), tokenizer=glm)
    ids, hidden = _prompt_ids(there, "the cat")
    assert (hidden, ids[hidden:]) == (2, glm.encode("the cat")) and ids[:2] == glm.start_of_text
