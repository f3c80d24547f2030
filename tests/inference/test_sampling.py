"""The drawn tokens have the probabilities that the settings promise."""

import pytest
import torch

from inference.sampling import Sampling


def test_sampling_draws_from_the_distribution_it_states():
    """p = (0.15, 0.5, 0.05, 0.3), not in order of size. top_p 0.75 keeps the two largest (0.5 < 0.75 <= 0.8):
    renormalised 0.625 and 0.375."""
    p = torch.tensor([0.15, 0.5, 0.05, 0.3])
    generator = torch.Generator().manual_seed(0)

    def frequencies(**settings):
        rows = p.log().expand(20_000, 4)
        drawn = Sampling(**{"temperature": 1.0, "top_p": 1.0, **settings}).draw(rows, None, generator)
        return torch.bincount(drawn, minlength=4) / 20_000

    close = dict(atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(), p, **close)
    torch.testing.assert_close(frequencies(top_p=0.75), torch.tensor([0, 0.625, 0, 0.375]), **close)
    torch.testing.assert_close(frequencies(top_k=3), torch.tensor([0.15, 0.5, 0, 0.3]) / 0.95, **close)
    squared = p.square() / p.square().sum()  # temperature 1/2 squares the probabilities
    torch.testing.assert_close(frequencies(temperature=0.5), squared, **close)


def test_top_p_stops_as_soon_as_it_is_reached():
    """p = (1/2, 1/4, 1/4) exactly: 1/2 is reached by the first token, so top_p 0.5 draws nothing else."""
    rows = torch.tensor([0.5, 0.25, 0.25]).log().expand(200, 3)
    assert not Sampling(temperature=1.0, top_p=0.5).draw(rows, None, torch.Generator().manual_seed(0)).any()


def test_repetition_penalty_by_hand():
    """Seen tokens: 2.0 / 2 = 1.0 falls behind 1.5; a negative score is multiplied: -1 * 2 = -2."""
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.5]])
    seen = torch.tensor([[True, False, True, False]])
    greedy = Sampling(temperature=0, repetition_penalty=2.0)
    assert greedy.draw(logits, seen, None).tolist() == [1]
    assert greedy.draw(torch.tensor([[-9.0, -9.0, -1.0, -1.5]]), seen, None).tolist() == [3]


def test_impossible_settings_are_refused_together():
    with pytest.raises(ValueError, match="temperature -1 must be 0 .greedy. or more; top_p 2 must be"):
        Sampling(temperature=-1, top_p=2)
