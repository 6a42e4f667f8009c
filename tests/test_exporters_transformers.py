"""The transformers front end and export backend, on tiny models with random weights."""

import copy
import dataclasses
import importlib
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from models import NEVER, draw_patch, fire_on_some, run, same_bits, with_threshold
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.exporters import AutoExportConfig, AutoHfExporter, ExportedModel, OnnxConfig, OnnxExporter
from transformers.exporters.auto import EXPORT_BACKENDS

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.baking.transfer import transfer
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.cli import main
from atpatch_onnx.errors import PatchFileError, PatchMismatchError
from atpatch_onnx.exporters import (
    AtPatchOnnxConfig,
    AtPatchOnnxExporter,
    ExportError,
    from_onnx,
    from_transformers,
    transformers_backend,
)
from atpatch_onnx.graph.names import FLAGGED, SCORE, flags_name
from atpatch_onnx.matching import find_sites
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.running.sessions import Session

# torch reads a saved output structure with what it has itself deprecated: torch/utils/_pytree.py, LeafSpec.
pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")]


@dataclass(frozen=True)
class Case:
    model: Any
    inputs: dict[str, torch.Tensor]
    options: dict[str, Any]
    plain: Any
    """The `ExportedModel` that transformers itself makes."""

    base: ir.Model
    firing: Patch
    silent: Patch

    @property
    def feed(self) -> dict[str, Any]:
        return {name: value.numpy() for name, value in self.inputs.items()}

    def config(self, patch: Patch | None = None, **options: Any) -> AtPatchOnnxConfig:
        return AtPatchOnnxConfig(**self.options, patch=patch, **options)


def quietly(action: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and transformers, in a call that is not ours
        return action()


def vit() -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return ViTForImageClassification(config), {"pixel_values": torch.rand(3, 3, 16, 16)}, {}


def bert() -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=3,
    )
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    return (
        BertForSequenceClassification(config),
        {"input_ids": torch.randint(0, 50, (3, 7)), "attention_mask": mask},
        {
            "dynamic_shapes": {
                name: {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=32)}
                for name in ("input_ids", "attention_mask")
            },
        },
    )


@pytest.fixture(scope="module", params=[vit, bert], ids=lambda make: make.__name__)
def case(request) -> Case:
    torch.manual_seed(0)
    model, inputs, options = request.param()
    model.eval()
    plain = quietly(lambda: OnnxExporter().export(model, inputs, OnnxConfig(**options)))
    base = from_transformers(model, inputs, config=OnnxConfig(**options))
    drawn = draw_patch(base)
    firing = fire_on_some(base, drawn, {name: value.numpy() for name, value in inputs.items()})
    return Case(model, inputs, options, plain, base, firing, drawn)


@pytest.fixture(scope="module")
def tiny_vit() -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model, inputs, _ = vit()
    return model.eval(), inputs


# The front end


def test_base_is_the_export_of_transformers(case):
    assert graph.fingerprint(case.base) == graph.fingerprint(case.plain.program)
    assert len(find_sites(case.base)) == 2


def test_fingerprint_survives_saving(case, tmp_path):
    case.plain.save_pretrained(tmp_path)
    assert (tmp_path / "model.onnx.data").stat().st_size > 0
    assert graph.fingerprint(from_onnx(tmp_path / "model.onnx")) == graph.fingerprint(case.base)
    loaded = ExportedModel.from_pretrained(tmp_path)
    assert graph.fingerprint(loaded.program) == graph.fingerprint(case.base)


def test_front_end_patches(case):
    patched = from_transformers(case.model, case.inputs, config=case.config(), patch=case.firing, target="web")
    assert read_record(patched).patch == case.firing.id
    assert not any(node.op_type == "If" for node in patched.graph)
    assert graph.fingerprint(unbake(patched)) == graph.fingerprint(case.base)
    assert run(patched, case.feed)[FLAGGED].any()


def test_front_end_refuses(case):
    with pytest.raises(ExportError, match="config: expected a config without a patch"):
        from_transformers(case.model, case.inputs, config=case.config(case.silent))
    with pytest.raises(ExportError, match=r"in inference mode.*eval\(\)"):
        from_transformers(copy.deepcopy(case.model).train(), case.inputs)
    with pytest.raises(ExportError, match=f"the export of {type(case.model).__name__}: expected") as caught:
        from_transformers(case.model, {"labels": torch.zeros(3)})
    assert "\n" not in str(caught.value)


# The backend


def test_round_trip(case, tmp_path):
    exported = AutoHfExporter.from_config(case.config(case.firing)).export(case.model, case.inputs)
    assert exported.export_format == "atpatch_onnx"
    outputs = exported(**case.inputs)
    assert list(outputs) == ["logits", FLAGGED, SCORE]
    assert outputs.logits.shape == (3, 3)
    assert outputs[FLAGGED].dtype == torch.bool
    assert outputs[FLAGGED].shape == outputs[SCORE].shape == (3, 1)
    assert outputs[FLAGGED].any()
    assert torch.equal(outputs[FLAGGED], outputs[SCORE] > 0)
    plain = case.plain(**case.inputs)
    assert not torch.equal(outputs.logits, plain.logits)

    exported.save_pretrained(tmp_path)
    loaded = ExportedModel.from_pretrained(tmp_path)
    again = loaded(**case.inputs)
    assert list(again) == list(outputs)
    assert all(torch.equal(again[name], outputs[name]) for name in outputs)

    saved = from_onnx(tmp_path / "model.onnx")
    record = read_record(saved)
    assert (record.patch, record.base) == (case.firing.id, case.firing.base)
    assert graph.fingerprint(unbake(saved)) == graph.fingerprint(case.base)
    assert graph.fingerprint(unbake(loaded.program)) == graph.fingerprint(case.base)
    manifest = json.loads((tmp_path / "export.json").read_text())
    assert manifest["export_format"] == "atpatch_onnx"
    noted = manifest["components"]["model"]["metadata"]["export_config"]
    assert noted["patch"]["id"] == case.firing.id
    assert noted["target"] == "cpu"


def test_a_detector_that_never_fires_changes_no_bit(case):
    exported = AtPatchOnnxExporter().export(case.model, case.inputs, case.config(case.silent))
    outputs = exported(**case.inputs)
    assert not outputs[FLAGGED].any()
    assert same_bits(outputs.logits.numpy(), case.plain(**case.inputs).logits.numpy())


def test_the_samples_without_a_flag_keep_their_bits(case):
    first = with_threshold(case.firing, 1, NEVER)
    detector = first.sites[0].detector
    assert detector is not None
    scores = sorted(run(bake(case.base, first), case.feed)[SCORE].ravel())
    patch = with_threshold(first, 0, detector.threshold + (scores[-1] + scores[-2]) / 2)
    outputs = AtPatchOnnxExporter(case.config(patch)).export(case.model, case.inputs)(**case.inputs)
    plain = case.plain(**case.inputs)
    flagged = outputs[FLAGGED][:, 0]
    assert flagged.sum() == 1
    assert same_bits(outputs.logits[~flagged].numpy(), plain.logits[~flagged].numpy())
    assert not torch.equal(outputs.logits[flagged], plain.logits[flagged])


def test_without_monitors(tiny_vit):
    model, inputs = tiny_vit
    patch = draw_patch(from_transformers(model, inputs))
    exported = AtPatchOnnxExporter(AtPatchOnnxConfig(patch=patch, monitor=False)).export(model, inputs)
    assert list(exported(**inputs)) == ["logits"]


def test_without_a_patch_it_is_the_base(case):
    exported = AutoHfExporter.from_config(case.config()).export(case.model, case.inputs)
    assert graph.fingerprint(exported.program) == graph.fingerprint(case.base)
    assert list(exported(**case.inputs)) == ["logits"]


def test_nested_answers():
    def fresh() -> tuple[Any, dict[str, Any]]:  # transformers 5.23 loses hidden states once a model was exported
        torch.manual_seed(0)
        model, inputs, _ = vit()
        return model.eval(), {**inputs, "output_hidden_states": True}

    patch = draw_patch(from_transformers(*fresh()))
    outputs = AtPatchOnnxExporter(AtPatchOnnxConfig(patch=patch)).export(*fresh())(**fresh()[1])
    assert list(outputs) == ["logits", "hidden_states", FLAGGED, SCORE]
    model, inputs = fresh()
    expected = model(**inputs)
    # Rounding of another order of float32 sums; states are of order 1.
    torch.testing.assert_close(outputs.hidden_states, expected.hidden_states, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=0)  # same reason


def test_a_tuple_stays_as_it_was():
    classifier, inputs, options = bert()
    model = classifier.bert.eval()
    model.config.return_dict = False
    patch = draw_patch(from_transformers(model, inputs, config=OnnxConfig(**options)))
    exported = AtPatchOnnxExporter().export(model, inputs, AtPatchOnnxConfig(**options, patch=patch))
    assert [value.name for value in exported.program.graph.outputs][-2:] == [FLAGGED, SCORE]
    outputs = exported(**inputs)
    assert isinstance(outputs, tuple)
    # Rounding of another order of float32 sums; states are of order 1.
    torch.testing.assert_close(outputs, model(**inputs), atol=1e-5, rtol=0)


def test_opset_23_with_the_fused_op(tiny_vit, tmp_path):
    model, inputs = tiny_vit
    base = from_transformers(model, inputs, config=OnnxConfig(opset_version=23))
    assert any(node.op_type == "Attention" for node in base.graph)
    patch = fire_on_some(base, draw_patch(base), {"pixel_values": inputs["pixel_values"].numpy()})
    exported = AtPatchOnnxExporter().export(model, inputs, {"opset_version": 23, "patch": patch, "target": "web"})
    outputs = exported(**inputs)
    assert outputs[FLAGGED].any()
    exported.save_pretrained(tmp_path)
    assert torch.equal(ExportedModel.from_pretrained(tmp_path)(**inputs).logits, outputs.logits)
    assert graph.fingerprint(unbake(from_onnx(tmp_path / "model.onnx"))) == patch.base


def test_one_stage_of_generation():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1))
    inputs = {"input_ids": torch.randint(2, 50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    exporter = AtPatchOnnxExporter(AtPatchOnnxConfig(dynamic=True))
    bases = exporter.export_for_generation(model.eval(), inputs).components
    assert set(bases) == {"prefill", "decode"}
    patch = draw_patch(bases["decode"].program)
    configs = {name: AtPatchOnnxConfig(dynamic=True, patch=patch if name == "decode" else None) for name in bases}
    patched = exporter.export_for_generation(model, inputs, configs).components
    assert graph.fingerprint(patched["prefill"].program) == graph.fingerprint(bases["prefill"].program)
    assert read_record(patched["decode"].program).patch == patch.id


_LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
_WIDTHS = {"vocab_size": 40, "d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 2}
_TALKERS = {
    "t5": ("T5", {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2,
                  "decoder_start_token_id": 0}),
    "bart": ("Bart", {**_LAYERS, **_WIDTHS, "max_position_embeddings": 64, "bos_token_id": 0, "pad_token_id": 1}),
    "whisper": ("Whisper", {**_LAYERS, **_WIDTHS, "num_mel_bins": 8, "max_source_positions": 20, "bos_token_id": 0,
                            "max_target_positions": 32, "pad_token_id": 1, "eos_token_id": 2,
                            "suppress_tokens": None, "begin_suppress_tokens": None}),
}  # fmt: skip
"""Encoder-decoders, by the class of transformers and the sizes of a small one."""


@pytest.mark.parametrize("family", _TALKERS)
def test_an_encoder_decoder_replaces_cross_keys_where_they_are_computed(family: str):
    """The graph that reads the prompt hands them on; in the one that goes on nothing is left to do for them."""
    torch.manual_seed(0)
    name, sizes = _TALKERS[family]
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    speech = {"input_features": torch.randn(2, 8, 40)}
    inputs = speech if family == "whisper" else {"input_ids": torch.randint(2, 40, (2, 7))}
    parts = AtPatchOnnxExporter(AtPatchOnnxConfig(dynamic=True)).export_for_generation(model, inputs).components
    prompt, decode = (parts[name].program for name in ("prefill", "decode"))
    own, cross = find_sites(prompt)
    assert (own.self_attention, cross.self_attention) == (True, False)
    patch = draw_patch(prompt)
    carried = transfer(patch, prompt, decode)
    assert [site.site for site in carried.sites] == [own.name]
    bake(decode, carried)
    only_cross = replace(patch, sites=tuple(site for site in patch.sites if site.site == cross.name))
    with pytest.raises(PatchMismatchError, match="Leave the graph as it is"):
        transfer(only_cross, prompt, decode)
    tokens = 20 if family == "whisper" else 7
    feed = {
        "decoder_input_ids": np.zeros((2, 1), np.int64),
        "encoder_outputs.last_hidden_state": np.random.default_rng(0).normal(size=(2, tokens, 32)).astype(np.float32),
    }
    patched = bake(prompt, fire_on_some(prompt, only_cross, feed), site_flags=True)
    names = ["past_key_values.cross_attention_cache.layers.0.keys", flags_name(cross.name)]
    before, after = (Session(one).run(feed, names[: 1 + number]) for number, one in enumerate((prompt, patched)))
    flags = after[names[1]]
    assert 0 < flags.sum() < flags.size
    neutral = only_cross.sites[0].neutral.key.reshape(1, 2, 1, 16)
    expected = np.where(flags[:, None, :, None], neutral, before[names[0]])
    assert np.array_equal(after[names[0]], expected.astype(np.float32))


def test_another_model_or_export_is_refused_with_advice(case):
    other = copy.deepcopy(case.model)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    exporter = AtPatchOnnxExporter(case.config(case.silent))
    with pytest.raises(PatchMismatchError, match=r"from_transformers\(model, inputs, config=\.\.\.\)"):
        exporter.export(other, case.inputs)
    with pytest.raises(PatchMismatchError, match="export options"):
        exporter.export(case.model, case.inputs, case.config(case.silent, opset_version=18))


def test_exports_print_nothing(tiny_vit, capfd):
    AtPatchOnnxExporter(AtPatchOnnxConfig()).export(*tiny_vit)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "torch/onnx" not in captured.err


# Which config an exporter uses


def test_config_handed_on_by_auto_exporter():
    one, two = AtPatchOnnxConfig(opset_version=18), AtPatchOnnxConfig(opset_version=20)
    first, second = AutoHfExporter.from_config(one), AutoHfExporter.from_config(two)
    assert (first.config, second.config) == (one, two)
    assert AutoHfExporter.from_config(AtPatchOnnxConfig(target="web")).config.target == "web"
    assert AtPatchOnnxExporter().config is None, "the config is handed on once"


def test_config_is_needed(tiny_vit):
    with pytest.raises(ExportError, match="config: expected an AtPatchOnnxConfig; found none"):
        AtPatchOnnxExporter().export(*tiny_vit)
    with pytest.raises(TypeError, match="AtPatchOnnxConfig"):
        AtPatchOnnxExporter().export(*tiny_vit, OnnxConfig())


# The config


@pytest.fixture
def patch_file(tmp_path, tiny_vit):
    patch = draw_patch(from_transformers(*tiny_vit))
    patch.save(tmp_path / "fix.safetensors")
    return tmp_path / "fix.safetensors", patch


def test_config_and_its_dicts(patch_file):
    path, patch = patch_file
    config = AtPatchOnnxConfig(patch=path, target="web", opset_version=20)
    assert config.patch.id == patch.id
    assert config.export_format == "atpatch_onnx"
    values = config.to_dict()
    assert values["export_format"] == "atpatch_onnx"
    again = AutoExportConfig.from_dict(values)
    assert isinstance(again, AtPatchOnnxConfig)
    assert (again.patch.id, again.target, again.opset_version) == (patch.id, "web", 20)
    assert AutoExportConfig.from_dict({"export_format": "atpatch_onnx", "patch": str(path)}).patch.id == patch.id
    assert dataclasses.replace(config, target="cpu").patch is config.patch
    written = config.to_json_string()
    assert str(path) not in written
    noted = json.loads(written)
    assert noted["patch"] == {
        "id": patch.id,
        "base": patch.base,
        "sites": [entry.site for entry in patch.sites],
        "layers": [],
    }
    assert noted["export_format"] == "atpatch_onnx"
    assert json.loads(AtPatchOnnxConfig().to_json_string())["patch"] is None
    with pytest.raises(ExportError, match=r"patch: expected a Patch.*found dict.*export\.json only names"):
        AutoExportConfig.from_dict(noted)


def test_config_names_what_is_allowed(tmp_path):
    with pytest.raises(ExportError, match=r"target: expected one of cpu, cuda, .*found 'toaster'"):
        AtPatchOnnxConfig(target="toaster")
    with pytest.raises(ExportError, match=r"patch: expected a Patch, the path.*found int"):
        AtPatchOnnxConfig(patch=3)
    with pytest.raises(ExportError, match="export_format: expected 'atpatch_onnx'; found 'onnx'"):
        AtPatchOnnxConfig(export_format="onnx")
    with pytest.raises(PatchFileError, match="nothing there"):
        AtPatchOnnxConfig(patch=tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="ort_fusions"):
        AtPatchOnnxConfig(ort_fusions="toaster")


# Registration


def test_registered_once_and_quietly(caplog):
    assert EXPORT_BACKENDS["atpatch_onnx"].exporter is AtPatchOnnxExporter
    with caplog.at_level(logging.WARNING):
        transformers_backend.register()
        importlib.import_module("atpatch_onnx.exporters.transformers_backend")
    assert not caplog.records
    assert EXPORT_BACKENDS["atpatch_onnx"].exporter is AtPatchOnnxExporter


def test_from_disk_on_the_command_line(tiny_vit, tmp_path, capsys):
    model, inputs = tiny_vit
    quietly(lambda: model.save_pretrained(tmp_path / "vit"))
    np.savez(tmp_path / "inputs.npz", **{name: tensor.numpy() for name, tensor in inputs.items()})
    paths = [str(tmp_path / "vit"), str(tmp_path / "inputs.npz"), "--no-dynamic", "--opset", "18"]
    base = tmp_path / "base.onnx"
    assert quietly(lambda: main(["export", *paths, "-o", str(base)])) == 0
    assert "the base, 2 attention sites\n" in capsys.readouterr().out

    draw_patch(graph.load(base)).save(tmp_path / "fix.safetensors")
    patched = tmp_path / "patched.onnx"
    options = ["--patch", str(tmp_path / "fix.safetensors"), "--target", "portable"]
    assert quietly(lambda: main(["export", *paths, "-o", str(patched), *options])) == 0
    assert read_record(graph.load(patched)).conditional is False
    assert graph.fingerprint(unbake(graph.load(patched))) == graph.fingerprint(graph.load(base))


@pytest.mark.parametrize("missing", ["model", "inputs"])
def test_from_disk_refuses_what_is_not_there(tiny_vit, tmp_path, capsys, missing):
    model, _ = tiny_vit
    if missing == "inputs":
        quietly(lambda: model.save_pretrained(tmp_path / "vit"))
    arguments = ["export", str(tmp_path / "vit"), str(tmp_path / "inputs.npz"), "-o", str(tmp_path / "out.onnx")]
    assert quietly(lambda: main(arguments)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"atpatch: {tmp_path / ('vit' if missing == 'model' else 'inputs.npz')}: expected ")
    assert not (tmp_path / "out.onnx").exists()
