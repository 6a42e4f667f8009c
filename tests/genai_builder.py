"""onnxruntime-genai's builder, run as a script, with what it reads of a Gemma-3 where transformers 5 no longer has it.

The builder reads rotary settings as transformers 4 wrote them: those of all layers flat, the local base beside them.
"""

import runpy
from typing import Any

import transformers

read = transformers.AutoConfig.from_pretrained


def flat(*arguments: Any, **options: Any) -> Any:
    """The configuration, rotary settings of each kind of layer as the builder knows them."""
    config = read(*arguments, **options)
    kinds = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in kinds:
        config.rope_local_base_freq = kinds["sliding_attention"]["rope_theta"]
        config.rope_theta = kinds["full_attention"]["rope_theta"]
        config.rope_parameters = kinds["full_attention"]
    return config


if __name__ == "__main__":
    transformers.AutoConfig.from_pretrained = flat
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
