"""Trainings in mixed precision, where the processor has instructions for it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 numbers itself; others imitate it, slowly."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@contextmanager
def mixed_precision(model: PreTrainedModel, *, enabled: bool) -> Iterator[None]:
    """Train `model` within it with products of bfloat16 numbers; weights, sums and updates stay float32.

    Takes half of the time (Micikevicius et al. 2018, arXiv 1710.03740). Attention is written out, which is quicker than
    the fused one here. No cast of a weight is kept: it would outlive the weight's next update.
    """
    if not enabled:
        yield
        return
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            yield
    finally:
        model.set_attn_implementation(usual)
