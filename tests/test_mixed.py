"""Mixed precision: products of bfloat16, weights that are updated in float32, and the model left as it was."""

import pytest
import torch
from torch.nn import functional
from transformers import ViTForImageClassification

from atpatch_onnx.cli.demo_vit import config, new_vit
from samples.mixed import has_bfloat16, mixed_precision


@pytest.fixture
def model() -> ViTForImageClassification:
    return new_vit(config(image_size=8, patch_size=4, layers=1, hidden=16))


def test_products_are_of_bfloat16_and_weights_of_float32(model):
    images = torch.rand(4, 1, 8, 8)
    with mixed_precision(model, enabled=True):
        logits = model(pixel_values=images).logits
        assert logits.dtype == torch.bfloat16
        functional.cross_entropy(logits, torch.zeros(4, dtype=torch.int64)).backward()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"
    assert model(pixel_values=images).logits.dtype == torch.float32


def test_a_weights_update_is_seen_at_once(model):
    """Autocast keeps its casts of weights until it ends, unless it is told not to."""
    images = torch.rand(4, 1, 8, 8)
    with mixed_precision(model, enabled=True):
        before = model(pixel_values=images).logits
        with torch.no_grad():
            model.classifier.weight.mul_(-1)
            model.classifier.bias.mul_(-1)
        after = model(pixel_values=images).logits
    torch.testing.assert_close(after, -before)


def test_where_it_is_not_wanted_nothing_changes(model):
    images = torch.rand(2, 1, 8, 8)
    wanted = model(pixel_values=images).logits
    with mixed_precision(model, enabled=False):
        assert torch.equal(model(pixel_values=images).logits, wanted)


def test_the_processor_says_what_it_has(monkeypatch):
    for capabilities, expected in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert has_bfloat16() is expected
