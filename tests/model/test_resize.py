"""More rows of the embedding: what was there keeps every bit, and a new token is an average one."""

import pytest
import torch

from model.resize import add_tokens
from tests.helpers.models import TINY_TOKENS, tiny_model


@pytest.mark.parametrize("tied", [True, False])
def test_old_tokens_keep_every_bit_and_new_ones_are_average(tied):
    model = tiny_model(tie_word_embeddings=tied)
    before, matrices = model(TINY_TOKENS).logits, [model.model.embed_tokens.weight, model.lm_head.weight]
    add_tokens(model, 70)
    after = model(TINY_TOKENS).logits
    assert after.shape[-1] == 70 == model.config.vocab_size == model.lm_head.out_features
    torch.testing.assert_close(after[..., :67], before, atol=1e-6, rtol=0)
    # the mean of rows gives the mean of logits; the noise is 1 % of what rows differ by
    torch.testing.assert_close(after[..., 67:], before.mean(-1, keepdim=True).expand(-1, -1, 3), atol=0.1, rtol=0)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for old, layer in zip(matrices, (model.model.embed_tokens, model.lm_head)):
        assert torch.equal(layer.weight[:67], old)
        distance = (layer.weight[67:] - old.mean(0)).abs() / old.std(0)
        assert 0 < distance.max() < 0.05 and len(layer.weight[67:].unique(dim=0)) == 3


def test_it_is_the_same_each_time_and_leaves_the_random_state_alone():
    """A run that is continued builds the same model again."""
    first, second = tiny_model(), tiny_model()
    torch.manual_seed(5)
    add_tokens(first, 80)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    torch.manual_seed(6)
    add_tokens(second, 80)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
