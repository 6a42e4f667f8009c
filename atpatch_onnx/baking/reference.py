"""The reference arithmetic of redistribution, in numpy and float64: the oracle of every test and of `verify`.

The same arithmetic is written as onnxscript functions in `atpatch_onnx.baking.functions`. It exists twice on purpose.

AtPatch (arXiv 2601.21695) replaces anomalous columns of the attention map with a unified benign attention and rescales
the others. Here, as in the design:

    visible_ij = P_ij > 0                         masked, padded and causal zeros stay zero
    n_i        = number of visible keys of row i
    s_i        = sum_j P_ij                             1, but for attention sinks and gated maps
    B_ij       = M_j * visible_ij * s_i * beta / n_i    what an anomalous column gets
    t_i        = sum_j B_ij
    R_ij       = (1 - M_j) * P_ij ;  r_i = sum_j R_ij
    P'_ij      = B_ij + R_ij * (s_i - t_i) / r_i    if r_i > TINY
    P'_i       = P_i                              if the row sees flagged keys only, up to TINY
    P'_b       = P_b                              if sample b has no flag

A visible benign key has a weight above zero, so the design's mass to be spread evenly, for r_i = 0, is never left over.
Graphs do not write P' (`functions.Redistributed`): with flagged tokens
that hand over a value v, a row's output is `Y'_i = (s_i - t_i) sum_j R_ij V_j / r_i + t_i v`, and `s_i v` where it sees
flagged keys only.

We differ from the paper in two ways: benign attention is in units of a row's uniform share, so that it means the same
at every length and under every mask; and flagged tokens hand over the site's mean value instead of their own
(`neutral_values`).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

TINY = 1e-30
"""Benign mass of a row (`r_i`) up to which it counts as none: dividing by less overflows float32."""

Float = NDArray[np.float64]


def redistributed_map(P: ArrayLike, M: ArrayLike, beta: ArrayLike) -> Float:
    """The attention map after redistribution.

    Args:
        P: Attention map `[batch, heads, queries, keys]`; rows sum to 1, or to 0 where everything is masked.
        M: Flags, bool `[batch, keys]`.
        beta: Benign attention in [0, 1], in units of a row's uniform share; broadcasts to `[batch, heads, queries, 1]`.

    Returns:
        `P'` `[batch, heads, queries, keys]`, float64; rows sum to what they summed to before.
    """
    P = np.asarray(P, np.float64)
    M = np.asarray(M, np.bool_)
    m = M[:, None, None, :].astype(np.float64)
    visible = (P > 0).astype(np.float64)
    n = visible.sum(-1, keepdims=True)
    flagged_visible = m * visible

    s = P.sum(-1, keepdims=True)
    share = s * np.asarray(beta, np.float64) / np.maximum(n, 1)
    t = share * flagged_visible.sum(-1, keepdims=True)
    R = (1 - m) * P
    r = R.sum(-1, keepdims=True)
    proportions = np.divide(R, r, out=np.zeros_like(R), where=r > TINY)
    redistributed = share * flagged_visible + proportions * (s - t)
    untouched = (r <= TINY) | ~np.any(M, axis=-1)[:, None, None, None]
    return np.where(untouched, P, redistributed)


def neutral_values(V: ArrayLike, M: ArrayLike, neutral: ArrayLike) -> Float:
    """The values that positions hand over: a flagged one the site's neutral value instead of its own.

    Args:
        V: Values `[batch, kv heads, keys, depth]`.
        M: Flags, bool `[batch, keys]`.
        neutral: Mean value over clean data, `[kv heads, depth]`.

    Returns:
        `V'` of the shape of `V`, float64.
    """
    V = np.asarray(V, np.float64)
    M = np.asarray(M, np.bool_)
    return np.where(M[:, None, :, None], np.asarray(neutral, np.float64)[None, :, None, :], V)


def attend(P: ArrayLike, V: ArrayLike) -> Float:
    """`P V` for grouped heads: `heads / kv heads` consecutive heads of `P` share one head of `V`.

    Args:
        P: `[batch, heads, queries, keys]`.
        V: `[batch, kv heads, keys, depth]`.

    Returns:
        `[batch, heads, queries, depth]`, float64.
    """
    P, V = np.asarray(P, np.float64), np.asarray(V, np.float64)
    return np.asarray(P @ np.repeat(V, P.shape[1] // V.shape[1], axis=1))


def redistributed_output(
    P: ArrayLike, V: ArrayLike, Y: ArrayLike, M: ArrayLike, beta: ArrayLike, neutral: ArrayLike | None
) -> Float:
    """The site's output `Y' = P' V'`; samples without a flag keep `Y`.

    Args:
        P: Attention map `[batch, heads, queries, keys]`.
        V: Values `[batch, kv heads, keys, depth]`.
        Y: The site's own output `[batch, heads, queries, depth]`.
        M: Flags, bool `[batch, keys]`.
        beta: Benign attention, broadcasts to `[batch, heads, queries, 1]`.
        neutral: Neutral value `[kv heads, depth]`, or None for the paper's form, in which tokens keep their own value.

    Returns:
        `[batch, heads, queries, depth]`, float64.
    """
    M = np.asarray(M, np.bool_)
    values = np.asarray(V, np.float64) if neutral is None else neutral_values(V, M, neutral)
    repaired = attend(redistributed_map(P, M, beta), values)
    return np.where(np.any(M, axis=-1)[:, None, None, None], repaired, np.asarray(Y, np.float64))
