"""What the tests of clients share: a tiny model and a parrot behind one server, and OpenAI's client that asks it."""

import pytest

from tests.helpers.models import small_model
from tests.helpers.servers import Parrot, running, served


@pytest.fixture(scope="module")
def model():
    return small_model(std=0.2, num_attention_heads=4, num_key_value_heads=2).eval()


@pytest.fixture(scope="module")
def parrot(model):
    return Parrot(model.config)


@pytest.fixture(scope="module")
def server(model, parrot):
    with running(served(model), served(parrot, "parrot", rows=1)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    import openai  # here, since it takes a second, and most tests of the server do without

    return openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)
