"""The reference arithmetic of redistribution, in numpy and float64: the oracle of the tests.

Ours (design section 5): flagged tokens show a neutral key and hand over a neutral value; the attention is the base's
own.

    K'_j = kbar  if M_j  else  K_j
    V'_j = vbar  if M_j  else  V_j
    Y'   = softmax(Q K'^T * scale + bias) V'

The paper's (AtPatch, arXiv 2601.21695) replaces columns of the map and keeps each token's own value; with `n` visible
keys, it is here in units of a row's uniform share, so that benign attention `beta` means the same at every length. No
graph has it: it is what the ablation compares with.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]


def replaced(X: ArrayLike, M: ArrayLike, neutral: ArrayLike) -> Float:
    """Keys or values with flagged tokens neutral.

    Args:
        X: `[batch, heads, tokens, depth]`.
        M: Flags, bool `[batch, tokens]`.
        neutral: `[heads, depth]`.

    Returns:
        Of the shape of X, float64.
    """
    X, M = np.asarray(X, np.float64), np.asarray(M, np.bool_)
    return np.asarray(np.where(M[:, None, :, None], np.asarray(neutral, np.float64)[None, :, None, :], X))


def attention_map(Q: ArrayLike, K: ArrayLike, *, scale: float | None = None, bias: ArrayLike = 0.0) -> Float:
    """The map `softmax(Q K^T * scale + bias)`; rows in which everything is hidden are zero.

    Args:
        Q: `[batch, heads, queries, depth]`.
        K: `[batch, kv heads, keys, depth]`; `heads / kv heads` consecutive heads of Q share one head of K.
        scale: None: one over the root of the depth.
        bias: Broadcasts to `[batch, heads, queries, keys]`; -inf hides a key.

    Returns:
        `[batch, heads, queries, keys]`, float64.
    """
    Q, K = np.asarray(Q, np.float64), np.asarray(K, np.float64)
    K = np.repeat(K, Q.shape[1] // K.shape[1], axis=1)
    scores = Q @ np.swapaxes(K, -1, -2) * (Q.shape[-1] ** -0.5 if scale is None else scale) + np.asarray(bias)
    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(largest), largest, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    return np.asarray(np.divide(weights, total, out=np.zeros_like(weights), where=total > 0))


def attend(P: ArrayLike, V: ArrayLike) -> Float:
    """`P V`, float64 `[batch, heads, queries, depth]`; consecutive heads of P share one head of V."""
    P, V = np.asarray(P, np.float64), np.asarray(V, np.float64)
    return np.asarray(P @ np.repeat(V, P.shape[1] // V.shape[1], axis=1))


def redistributed_columns(P: ArrayLike, M: ArrayLike, beta: ArrayLike) -> Float:
    """The paper's form: flagged columns of a map get benign attention, the others are rescaled.

    Args:
        P: Attention map `[batch, heads, queries, keys]`; rows sum to 1, or to 0 where everything is masked.
        M: Flags, bool `[batch, keys]`.
        beta: Benign attention in [0, 1], in units of a row's uniform share; broadcasts to `[batch, heads, queries, 1]`.

    Returns:
        `P'` of the shape of P, float64; rows sum to what they summed to before. Rows that see flagged keys only, and
        samples without a flag, stay as they are.
    """
    P, M = np.asarray(P, np.float64), np.asarray(M, np.bool_)
    m, visible = M[:, None, None, :].astype(np.float64), (P > 0).astype(np.float64)
    s = P.sum(-1, keepdims=True)
    B = m * visible * s * np.asarray(beta, np.float64) / np.maximum(visible.sum(-1, keepdims=True), 1)
    R = (1 - m) * P
    r = R.sum(-1, keepdims=True)
    share = np.divide(R, r, out=np.zeros_like(R), where=r > 0)
    return np.where((r <= 0) | ~np.any(M, axis=-1)[:, None, None, None], P, B + share * (s - B.sum(-1, keepdims=True)))
