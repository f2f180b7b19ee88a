# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of two engines that may add up 16-bit numbers in different orders."""

MOST = 0.5
"""Nats. The demo model's logits lie between 16 and 32, where bf16 has steps of 1/8: two steps each way of a token's own
logit. Seven answers of 300 tokens with and without graphs were at most 0.2 apart, 0.03 on average or less."""


def check_alike(answer: tuple[list[int], list[float]], expected: tuple[list[int], list[float]]) -> None:
    """Log-probabilities alike up to where the tokens part, and there: two tokens may be nearly as likely."""
    (tokens, logprobs), (expected_tokens, expected_logprobs) = answer, expected
    same = [a == b for a, b in zip(tokens, expected_tokens, strict=True)]
    until = [*same, False].index(False) + 1
    assert all(abs(a - b) < MOST for a, b in zip(logprobs[:until], expected_logprobs[:until], strict=True))
