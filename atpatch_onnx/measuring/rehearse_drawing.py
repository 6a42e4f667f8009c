"""Draw at random what a rehearsal needs beside inputs: what a fit would find out about a site."""

import numpy as np

from atpatch_onnx.baking.functions import LANDMARKS, SUMMARIES
from atpatch_onnx.patches.patch import Detector, Features, Redistribution
from atpatch_onnx.running.sessions import Array

NEVER = 3.0
"""A threshold that no score exceeds: scores are differences of two cosines."""

BETA = 0.5
"""Benign attention of a drawn patch: neither nothing nor the row's uniform share."""

_HIDDEN, _EMBEDDING = 16, 6


def draw_detector(
    rng: np.random.Generator,
    features: Features,
    count: int,
    threshold: float,
    *,
    hidden: int = _HIDDEN,
    embedding: int = _EMBEDDING,
) -> Detector:
    """A detector of `count` column features that gives every column a score of its own."""
    return Detector(
        features=features,
        mean=np.abs(_normal(rng, count, 1)),
        scale=np.abs(_normal(rng, count, 1)) + np.float32(0.5),
        weight_1=np.float32(0.25) * _normal(rng, hidden, count),
        bias_1=_normal(rng, hidden, 1),
        weight_2=_normal(rng, embedding, hidden),
        bias_2=_normal(rng, embedding, 1),
        prototypes=draw_prototypes(rng, embedding),
        threshold=threshold,
    )


def draw_prototypes(rng: np.random.Generator, embedding: int = _EMBEDDING) -> Array:
    """Two directions of embeddings, `[2, embedding]`, unit norm."""
    prototypes = _normal(rng, 2, embedding)
    return np.asarray(prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True))


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


def feature_count(features: Features, map_shape: tuple[int, ...]) -> int:
    """How many column features a map `[maps, heads, queries, keys]` has."""
    _, heads, queries, _ = map_shape
    each = {Features.WHOLE: queries, Features.LANDMARKS: LANDMARKS, Features.SUMMARY: len(SUMMARIES)}
    return heads * each[features]


def draw_redistribution(rng: np.random.Generator, kv_heads: int, depth: int) -> Redistribution:
    """Benign attention of half the uniform share, and a random neutral value."""
    neutral = rng.normal(size=(kv_heads, depth)).astype(np.float32)
    return Redistribution(np.full((1, 1, 1), BETA, np.float32), neutral)
