"""Inputs and attributes of com.microsoft's fused attention, one node each: all that the kernels of the CPU run."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MHA, ATTENTION, GQA = "MultiHeadAttention", "Attention", "GroupQueryAttention"

B, N, S, L, H = 2, 2, 4, 5, 8
"""Samples, heads, queries, keys and depth of `MultiHeadAttention` and `Attention`."""

PAST = 3


@dataclass(frozen=True)
class Case:
    """Inputs and attributes of one node."""

    op: str
    feeds: dict[str, np.ndarray]
    attributes: dict[str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] = ()
    """Queries of each sample that are none of its tokens' (a shorter sample's rest); () where all are."""


def floats(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def zeros_and_ones(*shape: int) -> np.ndarray:
    """A mask in which the first key of each row is visible."""
    mask = (floats(*shape, seed=5) > 0).astype(np.int32)
    mask[..., 0] = 1
    return mask


# MultiHeadAttention

SEPARATE = {"query": floats(B, S, N * H), "key": floats(B, L, N * H), "value": floats(B, L, N * H, seed=1)}
PER_HEAD = {"query": floats(B, S, N * H), "key": floats(B, N, L, H), "value": floats(B, N, L, H, seed=1)}
CACHE = {"past_key": floats(B, N, PAST, H), "past_value": floats(B, N, PAST, H, seed=1)}
BIAS = {"bias": floats(3 * N * H)}

PADDINGS = {
    "ends": ints(3, L),
    "ends_and_more": ints(3, L, 0, S, 2 * S, 0, L, 2 * L),
    "keys": np.array([[1, 0, 1, 1, 0], [2, -1, 1, 1, 1]], np.int32),
    "queries_and_keys": zeros_and_ones(B, S, L),
}


def multi_head_cases() -> Iterator[tuple[str, Case]]:
    def case(name: str, feeds: dict[str, np.ndarray], **attributes: Any):
        return f"mha_{name}", Case(MHA, feeds, {"num_heads": N, **attributes})

    yield case("plain", SEPARATE)
    yield case("scale", SEPARATE, scale=0.7)
    yield case("bias", SEPARATE | BIAS)
    yield case("one_query", SEPARATE | {"query": floats(B, 1, N * H)} | BIAS, unidirectional=1)
    yield case("other_depth", SEPARATE | {"value": floats(B, L, N * 5), "bias": floats(2 * N * H + N * 5)})
    for (name, mask), causal in itertools.product(PADDINGS.items(), (0, 1)):
        yield case(f"mask_{name}_{causal}", SEPARATE | {"key_padding_mask": mask}, unidirectional=causal)
    yield case("mask_filter", SEPARATE | {"key_padding_mask": ints(3, L)}, unidirectional=1, mask_filter_value=-1.0)
    lowest = float(np.finfo(np.float32).min)
    yield case("lowest_filter", SEPARATE | {"key_padding_mask": ints(0, 2)}, mask_filter_value=lowest)
    yield case("nothing_visible", SEPARATE | {"key_padding_mask": ints(0, L)})
    for batch, heads in itertools.product((1, B), (1, N)):
        yield case(f"attention_bias_{batch}_{heads}", SEPARATE | {"attention_bias": floats(batch, heads, S, L)})
    everything = SEPARATE | BIAS | CACHE | {"attention_bias": floats(1, N, S, PAST + L)}
    everything |= {"key_padding_mask": zeros_and_ones(B, PAST + L)}
    for causal in (0, 1):
        yield case(f"past_{causal}", SEPARATE | CACHE, outputs=3, unidirectional=causal)
        yield case(f"everything_{causal}", everything, outputs=3, unidirectional=causal)
        yield case(f"per_head_{causal}", PER_HEAD, unidirectional=causal)
    yield case("per_head_bias", PER_HEAD | BIAS)
    yield case("per_head_mask", PER_HEAD | {"key_padding_mask": ints(2, L)})


# Attention

PROJECTED = {"input": floats(B, S, 12), "weights": floats(12, 3 * N * H), "bias": floats(3 * N * H)}

MASKS = {
    "ends": ints(3, S),
    "ends_and_starts": ints(3, S, 1, 2),
    "ends_and_more": ints(3, S, 0, S, 2 * S, 0, S, 2 * S),
    "keys": np.array([[1, 0, 1, 1], [1, 1, 1, 0]], np.int32),
    "queries_and_keys": zeros_and_ones(B, S, S),
    "one_column": np.zeros((B, 1), np.int32),
    "one_entry": np.zeros((1, 1), np.int32),
}


def attention_cases() -> Iterator[tuple[str, Case]]:
    def case(name: str, feeds: dict[str, np.ndarray], **attributes: Any):
        return f"attention_{name}", Case(ATTENTION, feeds, {"num_heads": N, **attributes})

    yield case("plain", PROJECTED)
    yield case("weights", PROJECTED, weights=("weights", "bias"))
    yield case("scale", PROJECTED, scale=0.3)
    sizes = [N * H, N * H, N * 3]
    other = {"input": floats(B, S, 12), "weights": floats(12, sum(sizes)), "bias": floats(sum(sizes))}
    yield case("other_depth", other, qkv_hidden_sizes=sizes)
    for (name, mask), causal in itertools.product(MASKS.items(), (0, 1)):
        yield case(f"mask_{name}_{causal}", PROJECTED | {"mask_index": mask}, unidirectional=causal)
    yield case("attention_bias", PROJECTED | {"attention_bias": floats(1, N, S, S)}, unidirectional=1)
    cache = {"past": floats(2, B, N, PAST, H)}
    for causal in (0, 1):
        feeds = PROJECTED | cache | {"mask_index": ints(PAST + 2, PAST + S, 1, 2)}
        yield case(f"past_{causal}", feeds, unidirectional=causal, outputs=2)
    one = cache | {"input": floats(B, 1, 12), "mask_index": zeros_and_ones(B, PAST + 1)}
    yield case("past_one_query", PROJECTED | one, unidirectional=1, outputs=2)


# GroupQueryAttention

HEADS, KV, DEPTH, TOKENS, CAPACITY = 4, 2, 16, 6, 4


def tokens(count: int, samples: int = B, depth: int = DEPTH, kv: int = KV) -> dict[str, np.ndarray]:
    return {
        "query": floats(samples, count, HEADS * depth),
        "key": floats(samples, count, kv * depth, seed=1),
        "value": floats(samples, count, kv * depth, seed=2),
    }


def lengths(*keys: int) -> dict[str, np.ndarray]:
    return {"seqlens_k": ints(*keys) - 1, "total_sequence_length": np.array(max(keys), np.int32)}


def cache(samples: int = B) -> dict[str, np.ndarray]:
    shape = (samples, KV, CAPACITY, DEPTH)
    return {"past_key": floats(*shape, seed=3), "past_value": floats(*shape, seed=4)}


def angles(width: int = DEPTH) -> dict[str, np.ndarray]:
    return {"cos_cache": floats(40, width // 2, seed=5), "sin_cache": floats(40, width // 2, seed=6)}


def positions(samples: int, count: int) -> dict[str, np.ndarray]:
    return {"position_ids": np.random.default_rng(0).integers(0, 40, (samples, count))}


RAGGED = lengths(TOKENS, 4)
PROMPT = tokens(TOKENS) | RAGGED
PACKED = {"query": floats(B, TOKENS, (HEADS + 2 * KV) * DEPTH)} | RAGGED

STEPS = {
    "prompt": PROMPT,
    "prompt_in_buffer": tokens(3) | cache() | lengths(3, 2),
    "next": tokens(1) | cache() | lengths(CAPACITY + 1, CAPACITY + 1),
    "next_ragged": tokens(1) | cache() | lengths(CAPACITY + 1, 3),
    "next_in_buffer": tokens(1) | cache() | lengths(CAPACITY, 2),
    "more": tokens(3, 1) | cache(1) | lengths(CAPACITY + 3),
    "more_in_buffer": tokens(2, 1) | cache(1) | lengths(3),
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "window": {"local_window_size": 2},
    "wide_window": {"local_window_size": 40},
    "softcap": {"softcap": 1.0},
    "smooth": {"smooth_softmax": 1},
    "smooth_window": {"smooth_softmax": 1, "local_window_size": 2},
    "all": {"causal": 0},
}


def grouped_cases() -> Iterator[tuple[str, Case]]:
    def case(name: str, feeds: dict[str, np.ndarray], kv: int = KV, **attributes: Any):
        queries, ends = feeds["query"].shape[1], feeds["seqlens_k"] + 1
        prompt = queries == feeds["total_sequence_length"]
        rows = tuple(int(end) if prompt else queries for end in ends)
        attributes = {"num_heads": HEADS, "kv_num_heads": kv, "outputs": 3, **attributes}
        return f"gqa_{name}", Case(GQA, feeds, attributes, rows)

    for (step, feeds), (variant, attributes) in itertools.product(STEPS.items(), VARIANTS.items()):
        yield case(f"{step}_{variant}", feeds, **attributes)
    yield case("heads_of_their_own", tokens(TOKENS, kv=HEADS) | RAGGED, kv=HEADS)
    yield case("packed", PACKED)
    yield case("empty_window", PROMPT, local_window_size=0)
    biases = {"bias": {"attention_bias": floats(B, 1, TOKENS, TOKENS)}, "sink": {"head_sink": floats(HEADS)}}
    biases["both"] = {"attention_bias": floats(1, HEADS, TOKENS, TOKENS), "head_sink": floats(HEADS)}
    for (name, added), (variant, attributes) in itertools.product(biases.items(), VARIANTS.items()):
        yield case(f"{name}_{variant}", PROMPT | added, **attributes)
    masks = {"lowest": np.finfo(np.float32).min, "large": -1e30, "half": -65504.0, "infinite": -np.inf}
    for (name, fill), (variant, attributes) in itertools.product(masks.items(), VARIANTS.items()):
        bias = np.zeros((1, 1, TOKENS, TOKENS), np.float32)
        bias[..., :3] = fill  # three rows see nothing
        if not (name == "infinite" and variant in ("softcap", "all")):  # the kernel gives NaN
            yield case(f"mask_{name}_{variant}", PROMPT | {"attention_bias": bias}, **attributes)
    yield case("next_bias", STEPS["next_ragged"] | {"attention_bias": floats(B, 1, 1, CAPACITY + 1)})
    for interleaved in (0, 1):
        rotary = {"do_rotary": 1, "rotary_interleaved": interleaved}
        wide = tokens(TOKENS, depth=2 * DEPTH) | RAGGED
        yield case(f"rotary_packed_{interleaved}", PACKED | angles(), **rotary)
        yield case(f"rotary_part_{interleaved}", wide | angles(DEPTH), **rotary)
        for step, feeds in STEPS.items():
            given = positions(*feeds["query"].shape[:2])
            yield case(f"rotary_{step}_{interleaved}", feeds | angles(), **rotary)
            yield case(f"rotary_given_{step}_{interleaved}", feeds | angles() | given, **rotary)
    for step in ("prompt", "next_ragged"):
        feeds = STEPS[step] | angles()
        halves = {n: array.astype(np.float16) if array.dtype == np.float32 else array for n, array in feeds.items()}
        yield case(f"half_{step}", halves, do_rotary=1)


CASES = dict([*multi_head_cases(), *attention_cases(), *grouped_cases()])
