"""The drawn tokens have the probabilities that the settings promise."""

import pytest
import torch

from inference.sampling import Said, Sampling, SamplingRows, draw


def test_sampling_draws_from_the_distribution_it_states():
    """p = (0.15, 0.5, 0.05, 0.3), not in order of size. top_p 0.75 keeps the two largest (0.5 < 0.75 <= 0.8):
    renormalised 0.625 and 0.375."""
    p = torch.tensor([0.15, 0.5, 0.05, 0.3])
    generator = torch.Generator().manual_seed(0)

    def frequencies(**settings):
        rows = p.log().expand(20_000, 4)
        drawn = Sampling(**{"temperature": 1.0, "top_p": 1.0, **settings}).draw(rows, generator)
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
    assert not Sampling(temperature=1.0, top_p=0.5).draw(rows, torch.Generator().manual_seed(0)).any()


def test_the_smallest_top_p_keeps_the_likeliest_token():
    """1e-50 is 0 in fp32. No token was left, and the first one was drawn."""
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    assert Sampling(temperature=1.0, top_p=1e-50).draw(logits, torch.Generator().manual_seed(0)).tolist() == [2]


@pytest.mark.parametrize("only", ({"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5}))
def test_the_only_token_that_is_left_is_drawn_whatever_the_noise(only):
    """Its noise is 0 once in twenty million draws. Then all tokens were worth 0, and the first of them was drawn."""
    rows = SamplingRows.of([Sampling(**{"temperature": 1.0, "top_p": 1.0, **only})])
    assert draw(torch.tensor([[0.0, 1.0, 20.0]]), rows, torch.tensor([[0.5, 0.5, 0.0]])).tolist() == [2]


def test_penalties_and_bias_by_hand():
    """Read: 0. Said: 0 once, 2 twice. Repetition 2 divides 2.0 and multiplies -1.0; presence and frequency take
    0.5 + 0.25 from what was said once and 1.0 from what was said twice; a bias is added."""
    sampling = Sampling(repetition_penalty=2, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={1: -100, 3: 1})
    said = Said(sampling, [0], spared={4})
    for token in (0, 2, 2, 4):
        said.add(token)
    logits = torch.tensor([2.0, 1.5, -1.0, -1.5, 1.0])
    said.adjust(logits)
    expected = [2.0 / 2 - 0.75, 1.5 - 100, -1.0 * 2 - 1.0, -1.5 + 1, 1.0 - 0.75]  # 4 is spared from repetition alone
    assert logits.tolist() == pytest.approx(expected)


def test_penalties_do_not_wait_for_the_device(monkeypatch):
    """What Python gives a tensor on a GPU is copied there from memory that is not page-locked, which waits."""

    def waits(*_, device, **__):
        raise AssertionError(f"a copy to {device} that waits")

    said = Said(Sampling(repetition_penalty=2, presence_penalty=0.5, logit_bias={1: -100}), [0])
    said.add(2)
    monkeypatch.setattr(torch, "tensor", waits)
    said.adjust(torch.zeros(5, device="meta"))


def test_rows_draw_by_their_own_settings():
    """A row with each setting, side by side: p = (0.5, 0.3, 0.15, 0.05)."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    warm = dict(temperature=1.0, top_p=1.0)
    rows = [
        (Sampling(temperature=0), [1, 0, 0, 0]),
        (Sampling(**warm), p.tolist()),
        (Sampling(**warm, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.75), [0.625, 0.375, 0, 0]),
        (Sampling(**warm, min_p=0.29), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),  # 0.29 of 0.5 is 0.145
        (Sampling(**{**warm, "temperature": 0.5}), (p**2 / (p**2).sum()).tolist()),
    ]
    settings = SamplingRows.of([sampling for sampling, _ in rows])
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(len(rows), 4)
    for _ in range(4000):
        drawn = draw(p.log().expand(len(rows), 4), settings, torch.rand(len(rows), 4, generator=generator))
        counts[torch.arange(len(rows)), drawn] += 1
    torch.testing.assert_close(counts / 4000, torch.tensor([share for _, share in rows]), atol=0.03, rtol=0)


def test_top_p_over_more_tokens_than_are_looked_at_first():
    """600 equally likely tokens of 1,000: 0.9 of the probability needs 540 of them, more than LIKELIEST. Equal ones
    are kept or dropped together, so all 600 stay, and none of the others."""
    logits = torch.cat((torch.zeros(600), torch.full((400,), -5.0))).expand(50, 1000)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([Sampling(temperature=1.0, top_p=0.9).draw(logits, generator) for _ in range(40)])
    assert 560 < drawn.unique().numel() and drawn.max() < 600


def test_top_p_of_1_keeps_all_beside_a_row_with_another():
    """In fp32 the first token has probability 1, and yet the second one 2e-9."""
    rows = SamplingRows.of([Sampling(temperature=1.0, top_p=1.0), Sampling(temperature=1.0, top_p=0.5)])
    noise = torch.tensor([[1e-30, 1 - 2**-24]] * 2)  # for the second one
    assert draw(torch.tensor([[0.0, -20.0]] * 2), rows, noise).tolist() == [1, 0]


def test_a_temperature_of_almost_nothing_takes_the_likeliest():
    """1e-39 made the logits infinite, the probabilities NaN, and top_p look for the token at place -1."""
    logits = torch.tensor([[1.0, 3.0, -2.0], [5.0, 0.0, 4.9]])
    for temperature in (0, 1e-320, 1e-39, 1e-6, 1e-4):
        drawn = Sampling(temperature=temperature, top_p=0.5, min_p=0.1, top_k=2).draw(logits, torch.Generator())
        assert drawn.tolist() == [1, 0]


def test_nan_is_drawn_from_without_an_error():
    """On a GPU an index of -1 would end the whole process. Who asks learns of the NaN from inference/engine.py."""
    logits = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 9.0, 1.0]])
    settings = SamplingRows.of([Sampling(temperature=1.0, top_p=0.5, top_k=2, min_p=0.1)] * 2)
    assert draw(logits, settings, torch.full((2, 3), 0.5))[1] == 1


def test_impossible_settings_are_refused_together():
    with pytest.raises(ValueError, match="temperature -1 must be 0 .greedy. or more; top_p 2 must be"):
        Sampling(temperature=-1, top_p=2)
