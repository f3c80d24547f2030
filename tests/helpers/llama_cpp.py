"""llama.cpp in this process, by the package xllamacpp (wheels on PyPI): what our GGUF files must agree with."""

import json
import urllib.request

import pytest


class LlamaCpp:
    """One file, loaded: computes in fp32 on one thread."""

    def __init__(self, path):
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.port = 512, 1, 0, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.verbosity = False, -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **values) -> dict:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(values).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        return self.post("/tokenize", content=text, add_special=special, parse_special=special)["tokens"]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """Ids that follow; it stops after the end token."""
        return self.post("/completion", prompt=ids, n_predict=count, temperature=0, return_tokens=True, stream=False)[
            "tokens"
        ]

    def next_token(self, ids: list[int]) -> dict[int, float]:
        """{id: log-probability} of the 40 likeliest."""
        # The sampled token is a letter, whatever the probabilities: those before half a character are not reported.
        letter = [[self.tokenize("a")[0], 1e4]]
        answer = self.post("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=40, logit_bias=letter)
        first = answer["completion_probabilities"][0]["top_logprobs"]
        return {item["id"]: item["logprob"] for item in first}
