"""Functions as a user writes them."""

import triton.language as tl

import pyfmha


@pyfmha.score_function
def soft(score, batch, head, query, key, caps):
    """cap * tanh(score / cap). Quotients of numbers that a head has cost nothing, exp2 less than exp."""
    cap = tl.load(caps + head)
    power = tl.exp2(score * (-2 * 1.4426950408889634 / cap))
    return cap * (2 / (1 + power) - 1)


@pyfmha.score_function
def soft_cap(score, batch, head, query, key, caps):
    cap = tl.load(caps + head)
    return pyfmha.soft_cap(score, cap)


@pyfmha.score_function
def narrow_cap(score, batch, head, query, key, caps):
    """In float32, wherever it is evaluated."""
    return pyfmha.soft_cap(score.to(tl.float32), tl.load(caps + head))


@pyfmha.mask_function(bounds=lambda first_query, last_query, width: (first_query - width + 1, last_query + 1))
def near(batch, head, query, key, width):
    return (query - key < width) & (key <= query)


@pyfmha.mask_function
def even(batch, head, query, key):
    return (query + key) % 2 == 0


@pyfmha.mask_function(bounds=lambda first_query, last_query, kv_len: (0, last_query + 1, 0, first_query + 1))
def causal(batch, head, query, key):
    return key <= query


@pyfmha.mask_function(inputs={"flags": "*i32"})
def flagged(batch, head, query, key, flags):
    """An integer, of which all but 0 is seen."""
    return tl.load(flags + key) & 262


@pyfmha.score_function
def constant(score, batch, head, query, key):
    """One number for all."""
    return 0.5


@pyfmha.score_function
def of_keys(score, batch, head, query, key):
    """One for each key, an integer."""
    return key % 3


@pyfmha.score_function(inputs={"halves": "*fp16", "most": "fp32"})
def dropped(score, batch, head, query, key, halves, most):
    """Minus infinity where a number of the key is above another."""
    return tl.where(tl.load(halves + key) > most, float("-inf"), score)


soft_near = pyfmha.score_and_mask("soft_near", soft, near)
