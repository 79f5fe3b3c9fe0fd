"""The FIGA loss against numbers worked by hand, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from fgalign.losses.figa import apply_threshold, figa_loss, initial_weights, revised_weights


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=tolerance)


# One revised row, one initial row. NLLs: 1.0, 2.0, 0.5 and 0.3, 0.7, 0.1.
LOGPS = tensor([[-1.0, -2.0, -0.5], [-0.3, -0.7, -0.1]])
WEIGHTS = tensor([[1.0, 0.0, 1.0], [-0.5, -0.5, 0.0]])


def test_weights_of_a_revised_response():
    labels, eos = tensor([[1, 0, 0], [1, 0, 1]]), tensor([[False, False, True], [False, False, False]])
    # The end token counts as good though it was not edited.
    close(revised_weights(labels, eos, alpha=2.0, gamma=0.25), [[2.0, 0.25, 2.0], [2.0, 0.25, 2.0]])
    assert revised_weights(labels, eos, alpha=1, gamma=0).dtype == torch.float32


def test_weights_of_an_initial_response():
    labels, eos = tensor([[-1, 0, -1], [0, -1, -1]]), tensor([[False, False, True], [False, False, False]])
    # The end token is not penalised though it was edited; the second row was cut off, so its last token is.
    close(initial_weights(labels, eos, beta=0.5), [[-0.5, 0.0, 0.0], [0.0, -0.5, -0.5]])


def test_loss():
    # 0.3 <= 0.6 is kept, 0.7 is dropped: (1 * 1.0 + 1 * 0.5 - 0.5 * 0.3) / 3 = 1.35 / 3 = 0.45.
    result = figa_loss(LOGPS, WEIGHTS, threshold=0.6)
    close(result.loss, 0.45)
    assert (result.weighted_tokens, result.dropped_tokens) == (3, 1)


def test_loss_without_threshold():
    # (1.5 - 0.5 * 0.3 - 0.5 * 0.7) / 4 = 1.0 / 4.
    result = figa_loss(LOGPS, WEIGHTS, threshold=None)
    close(result.loss, 0.25)
    assert (result.weighted_tokens, result.dropped_tokens) == (4, 0)


def test_loss_with_a_weight_everywhere():
    # gamma 0.2 on the revised row's middle token, alpha 2: (2 * 1 + 0.2 * 2 + 2 * 0.5 - 0.5 * 0.3) / 4 = 3.25 / 4.
    weights = tensor([[2.0, 0.2, 2.0], [-0.5, -0.5, 0.0]])
    close(figa_loss(LOGPS, weights, threshold=0.6).loss, 0.8125)


def test_normalizer_replaces_the_count():
    result = figa_loss(LOGPS, WEIGHTS, threshold=0.6, normalizer=10.0)
    close(result.loss, 0.135)  # 1.35 / 10
    assert result.weighted_tokens == 3
    close(figa_loss(LOGPS, WEIGHTS, threshold=0.6, normalizer=tensor(10.0)).loss, 0.135)


def test_gradient():
    # d loss / d logp = -weight / 3 where the weight is kept, and nothing flows through the threshold.
    logps = LOGPS.clone().requires_grad_()
    figa_loss(logps, WEIGHTS, threshold=0.6).loss.backward()
    close(logps.grad, [[-1 / 3, 0.0, -1 / 3], [0.5 / 3, 0.0, 0.0]])


def test_the_two_readings_of_the_threshold():
    # NLL 0.55 is p = 0.576950: likely enough under NLL <= 0.6, not under p >= 0.6. NLL 0.5 is p = 0.606531: both.
    weights, logps = torch.full((1, 3), -0.5), tensor([[-0.50, -0.55, -0.65]])
    close(apply_threshold(weights, logps, 0.6, "nll"), [[-0.5, -0.5, 0.0]])
    close(apply_threshold(weights, logps, 0.6, "probability"), [[-0.5, 0.0, 0.0]])
    close(figa_loss(logps, weights, threshold=0.6).loss, -0.5 * (0.50 + 0.55) / 2)  # the default reading
    close(figa_loss(logps, weights, threshold=0.6, reading="probability").loss, -0.5 * 0.50)


def test_the_threshold_itself_is_still_penalised():
    close(apply_threshold(tensor([[-1.0]]), tensor([[-0.5]]), 0.5, "nll"), [[-1.0]])
    close(apply_threshold(tensor([[-1.0]]), tensor([[0.0]]), 1.0, "probability"), [[-1.0]])


def test_the_threshold_never_drops_a_good_token():
    weights, logps = tensor([[1.0, 0.25]]), tensor([[-20.0, -20.0]])
    for reading in ("nll", "probability"):
        close(apply_threshold(weights, logps, 0.6, reading), weights)


def test_unknown_reading():
    with pytest.raises(ValueError, match="threshold reading: expected 'nll' or 'probability', found 'p'"):
        apply_threshold(WEIGHTS, LOGPS, 0.6, "p")


@pytest.mark.parametrize(
    "weights",
    [
        torch.zeros(2, 3),  # nothing carries weight
        tensor([[0.0, -0.5, 0.0], [0.0, -0.5, 0.0]]),  # the threshold drops all (NLL 2.0 and 0.7)
    ],
)
def test_batch_without_any_weight(weights):
    logps = LOGPS.clone().requires_grad_()
    result = figa_loss(logps, weights, threshold=0.6)
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert result.weighted_tokens == 0
    assert result.dropped_tokens == int((weights != 0).sum())
    assert logps.grad.tolist() == [[0.0] * 3] * 2


def test_positions_without_weight_may_hold_anything():
    logps = tensor([[-1.0, math.nan, -math.inf]], requires_grad=True)
    result = figa_loss(logps, tensor([[1.0, 0.0, 0.0]]))
    result.loss.backward()
    assert result.loss.item() == 1.0
    assert logps.grad.tolist() == [[-1.0, 0.0, 0.0]]


def test_penalising_everything_is_minus_imitating_it():
    weights = torch.ones(2, 3)
    plus, minus = (figa_loss(LOGPS, sign * weights, threshold=None).loss for sign in (1, -1))
    close(plus, -LOGPS.mean())
    close(minus, -plus)
