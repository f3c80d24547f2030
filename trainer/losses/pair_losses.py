"""The losses over pairs of answers: a formula and a row of `LOSSES` each.

Letters: y_c and y_r are the chosen and the rejected answer to a prompt. log p(y) is the sum of an answer's token
log-probabilities, log p(y)/|y| their mean. With a reference model, log p(y) stands for log p(y) - log p_ref(y).
s is the sigmoid, b is beta, P = pairs of a batch.

The names of a formula's parameters say what it is given, so nothing else has to be written down about it:

    sums     (P, 2)  log p(y_c), log p(y_r)
    means    (P, 2)  the same divided by the number of tokens
    beta and the others: the options of trainer/train_dpo.py with these names

It returns the loss of each pair, (P,). This file imports no torch, so that `--help` is instant and knows the losses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


SCORES = ("sums", "means")


@dataclass(frozen=True)
class PairLoss:
    function: Callable[..., Tensor]
    reference: bool  # whether log-probabilities are taken relative to a reference model
    beta: float = 0.1  # where --beta does not say otherwise

    @property
    def scores(self) -> tuple[str, ...]:
        """The log-probabilities that the function asks for. Rewards are measured by the first."""
        return tuple(name for name in self._parameters() if name in SCORES)

    @property
    def options(self) -> tuple[str, ...]:
        """The options that it has besides beta."""
        return tuple(name for name in self._parameters() if name not in (*SCORES, "beta"))

    def _parameters(self) -> list[str]:
        return list(inspect.signature(self.function).parameters)


def sigmoid(sums: Tensor, means: Tensor, beta: float, rpo_alpha: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """DPO (arXiv:2305.18290, eq. 7): -log s(b h) of h = log p(y_c) - log p(y_r). With label smoothing e (cDPO,
    https://ericmitchell.ai/cdpo.pdf, eq. 3): -(1 - e) log s(b h) - e log s(-b h). With a = rpo_alpha it also keeps the
    chosen answer likely: - a log p(y_c)/|y_c| (arXiv:2404.19733, eq. 1). There that has no reference; here the loss
    is smaller by a constant, and still starts at log 2."""
    return _smoothed(beta * _margin(sums), label_smoothing) - rpo_alpha * means[:, 0]


def ipo(means: Tensor, beta: float) -> Tensor:
    """(h - 1/(2b))^2 (arXiv:2310.12036, eq. 17). Of means: with sums the target would depend on the length."""
    return (_margin(means) - 1 / (2 * beta)).square()


def hinge(sums: Tensor, beta: float) -> Tensor:
    """SLiC-HF's max(0, 1 - b h) (arXiv:2305.10425)."""
    return (1 - beta * _margin(sums)).relu()


def simpo(means: Tensor, beta: float, label_smoothing: float, simpo_gamma: float) -> Tensor:
    """-log s(b h - g) (arXiv:2405.14734, eq. 6; section 4.1 for beta)."""
    return _smoothed(beta * _margin(means) - simpo_gamma, label_smoothing)


def orpo(means: Tensor, beta: float) -> Tensor:
    """-log p(y_c)/|y_c| - b log s(log odds(y_c)/odds(y_r)), odds = q / (1 - q) of q = p(y)^(1/|y|) (arXiv:2403.07691,
    eq. 6, 7)."""
    chosen, rejected = means.unbind(1)
    log_odds_ratio = _margin(means) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - beta * _log_sigmoid(log_odds_ratio)


def cpo(sums: Tensor, means: Tensor, beta: float, cpo_alpha: float, label_smoothing: float = 0.0) -> Tensor:
    """-log s(b h) - a log p(y_c)/|y_c| (arXiv:2401.08417, section 3), the likelihood a mean over tokens as in trl."""
    return _smoothed(beta * _margin(sums), label_smoothing) - cpo_alpha * means[:, 0]


LOSSES = {
    "sigmoid": PairLoss(sigmoid, reference=True),
    "ipo": PairLoss(ipo, reference=True),
    "hinge": PairLoss(hinge, reference=True),
    "simpo": PairLoss(simpo, reference=False, beta=2.0),
    "orpo": PairLoss(orpo, reference=False),
    "cpo": PairLoss(cpo, reference=False),
}
OWN_OPTIONS = sorted({option for loss in LOSSES.values() for option in loss.options})  # that only some losses have


def _margin(scores: Tensor) -> Tensor:
    """h, (P, 2) -> (P,)"""
    chosen, rejected = scores.unbind(1)
    return chosen - rejected


def _smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    """-log s(x), and the share `label_smoothing` of the other label's."""
    return -(1 - label_smoothing) * _log_sigmoid(x) - label_smoothing * _log_sigmoid(-x)


def _log_sigmoid(x: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) of x < 0. An answer that is certain (x = 0) gets odds of 10^7 instead of infinity."""
    return x.clamp(max=-1e-7).expm1().neg().log()
