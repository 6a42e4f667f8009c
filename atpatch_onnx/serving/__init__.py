"""Files that serving stacks read: a Triton model repository, a KServe manifest."""

from atpatch_onnx.serving.kserve import KServeOptions, write_inference_service
from atpatch_onnx.serving.triton import TritonOptions, write_model_repository

__all__ = ["KServeOptions", "TritonOptions", "write_inference_service", "write_model_repository"]
