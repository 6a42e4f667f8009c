"""A patched model in production: files for serving stacks, counters, and the alarm when flags become frequent."""

from atpatch_onnx.serving.counters import Counters, Stats
from atpatch_onnx.serving.drift import Drift, drift
from atpatch_onnx.serving.genai import write_genai_folder
from atpatch_onnx.serving.kserve import KServeOptions, write_inference_service
from atpatch_onnx.serving.session import PatchedSession
from atpatch_onnx.serving.telemetry import register_opentelemetry, register_prometheus
from atpatch_onnx.serving.triton import TritonOptions, write_model_repository

__all__ = [
    "Counters",
    "Drift",
    "KServeOptions",
    "PatchedSession",
    "Stats",
    "TritonOptions",
    "drift",
    "register_opentelemetry",
    "register_prometheus",
    "write_genai_folder",
    "write_inference_service",
    "write_model_repository",
]
