"""Texts for a model with Llama 2's tokenizer: they begin with its BOS."""

import httpx
import pytest

from tests.helpers.models import tiny_model
from tests.helpers.servers import Parrot, running, served
from tests.helpers.tokenizers import BEGINS, ENDS, llama_like

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
