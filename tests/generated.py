"""What onnxruntime-genai writes behind prompts, and what a patched folder flags on the way."""

from pathlib import Path

import numpy as np
import pytest

genai = pytest.importorskip("onnxruntime_genai")


def written(
    folder: Path, prompts: np.ndarray, *, steps: int = 6, chunks: int = 1, **options: object
) -> tuple[list[list[int]], list[list[bool]]]:
    """What the runtime writes behind prompts of one length, and what it flags of each at each step."""
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(batch_size=len(prompts), max_length=64, **options)
    generator = genai.Generator(model, parameters)
    for part in np.array_split(prompts, chunks, axis=1):
        generator.append_tokens(part.astype(np.int32))
    flags = []
    for _ in range(steps):
        if generator.is_done():
            break
        generator.generate_next_token()
        if folder.name == "patched":
            flags.append(generator.get_output("atpatch/flagged").ravel().tolist())
    rows = [generator.get_sequence(row)[prompts.shape[1] :].tolist() for row in range(len(prompts))]
    return rows, flags
