"""More rows for the embedding and the head, for a tokenizer that got more tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from model.transformer import CausalLM

NOISE = 0.01  # of the old rows' standard deviation


@torch.no_grad()
def add_tokens(model: CausalLM, rows: int) -> None:
    """Enlarges the vocabulary to `rows`, in place. Old rows keep every bit.

    A new row is the mean of the old ones, so that a new token is no likelier than others before it is trained, plus a
    little noise, so that no two are equal (the mean: nlp.stanford.edu/~johnhew/vocab-expansion.html). The same weights
    get the same rows each time.
    """
    assert rows >= model.config.vocab_size
    generator = torch.Generator().manual_seed(0)

    def enlarged(weight: Tensor) -> nn.Parameter:
        old = weight.float()
        noise = torch.randn(rows - len(old), old.shape[1], generator=generator)
        new = old.mean(0) + NOISE * old.std(0) * noise.to(old.device)
        return nn.Parameter(torch.cat((weight, new.to(weight.dtype))))

    embedding, head = model.model.embed_tokens, model.lm_head
    tied = head.weight is embedding.weight
    embedding.weight = enlarged(embedding.weight)
    head.weight = embedding.weight if tied else enlarged(head.weight)
    embedding.num_embeddings = head.out_features = rows
    model.config = replace(model.config, vocab_size=rows)
