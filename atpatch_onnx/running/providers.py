"""Execution providers of onnxruntime: what they are called here and there, what they need, and which this build has.

Nothing else in the package knows a provider by name.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnxruntime as ort

from atpatch_onnx.errors import RunError

Providers = Sequence[str | tuple[str, Mapping[str, str]]]
"""Names of `PROVIDERS`, or onnxruntime's own, each with its options or without, the preferred one first. What they do
not take runs on the CPU."""

Chosen = list[tuple[str, dict[str, str]]]
"""The same in onnxruntime's own words."""


@dataclass(frozen=True)
class Provider:
    """What runs nodes."""

    name: str
    """In onnxruntime."""

    install: str
    """What brings it."""

    device: str = "cpu"
    """Where its tensors lie, as `OrtValue` calls it."""

    exact: Mapping[str, str] = field(default_factory=dict)
    """Options without which it is not as exact as a type says."""

    compiles: bool = False
    """Whether it makes one program of many nodes: what these compute in between depends on those around them."""

    recording: Mapping[str, str] = field(default_factory=dict)
    """Options that let it record a run and play it again (CUDA graphs); none where it cannot."""


CPU = "CPUExecutionProvider"

PROVIDERS: Mapping[str, Provider] = {
    "cpu": Provider(CPU, "pip install onnxruntime"),
    "cuda": Provider(
        "CUDAExecutionProvider",
        "pip install onnxruntime-gpu, with the CUDA and cuDNN that it names",
        device="cuda",
        exact={"use_tf32": "0"},  # by default products of float32 keep ten bits of their factors
        recording={"enable_cuda_graph": "1"},
    ),
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        "pip install onnxruntime-gpu, and TensorRT",
        device="cuda",
        compiles=True,
        recording={"trt_cuda_graph_enable": "1"},
    ),
    "directml": Provider(
        "DmlExecutionProvider", "pip install onnxruntime-directml, on Windows", device="dml", compiles=True
    ),
    "coreml": Provider("CoreMLExecutionProvider", "pip install onnxruntime, on macOS", compiles=True),
    "openvino": Provider("OpenVINOExecutionProvider", "pip install onnxruntime-openvino", compiles=True),
}

_BY_OWN_NAME = {provider.name: provider for provider in PROVIDERS.values()}


def known(name: str) -> Provider:
    """A provider by its name here or in onnxruntime."""
    return PROVIDERS.get(name) or _BY_OWN_NAME.get(name) or Provider(name, "build onnxruntime with it")


def first(providers: Providers) -> Provider:
    """The preferred one.

    Raises:
        RunError: There is none.
    """
    return known(chosen(providers)[0][0])


def on_cpu(providers: Providers) -> bool:
    """Whether everything runs on the CPU's provider."""
    return all(name == CPU for name, _ in chosen(providers))


def exact(providers: Providers) -> Providers:
    """The same, each with the options without which it computes less exactly than a type says; given ones stay."""
    return [(name, {**known(name).exact, **given}) for name, given in chosen(providers)]


def chosen(providers: Providers, *, recorded: bool = False) -> Chosen:
    """Providers and their options, in onnxruntime's own words.

    Args:
        providers: In order of preference.
        recorded: Whether a run is to be recorded and played again.

    Raises:
        RunError: None is named, this build has not got one of them, or one cannot record runs.
    """
    there = ort.get_available_providers()
    found: Chosen = []
    for entry in providers:
        name, given = (entry, {}) if isinstance(entry, str) else entry
        provider = known(name)
        if provider.name not in there:
            short = sorted(key for key, one in PROVIDERS.items() if one.name in there)
            raise RunError(
                f"the provider {name}",
                expected=f"one that this build of onnxruntime {ort.__version__} has: {', '.join(short)}",
                found="one that it does not have",
                advice=f"Choose one of these, or: {provider.install}."
                if name in (*PROVIDERS, *_BY_OWN_NAME)
                else f"Choose one of these; known are {', '.join(PROVIDERS)}, and onnxruntime's own names.",
            )
        found.append((provider.name, {**(provider.recording if recorded else {}), **given}))
    if not found:
        raise RunError("the providers", expected="at least one", found="none", advice="Name one, such as cpu.")
    if recorded and not known(found[0][0]).recording:
        raise RunError(
            f"the provider {found[0][0]}",
            expected="one that records a run and plays it again, cuda or tensorrt",
            found="one that does not",
            advice="Leave out the CUDA graph.",
        )
    return found


def require_started(session: ort.InferenceSession, wanted: Chosen, where: str | os.PathLike[str]) -> None:
    """Refuse a session that began without a provider: onnxruntime prints why, and goes on with what is left.

    Raises:
        RunError: It did.
    """
    missing = [name for name, _ in wanted if name not in session.get_providers()]
    if missing:
        provider = known(missing[0])
        raise RunError(
            os.fspath(where),
            expected=f"a session with {missing[0]}",
            found="one without: it did not start, for want of a device, a driver or a library",
            advice=f"Check the device; it comes with: {provider.install}.",
        )
