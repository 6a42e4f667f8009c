"""Small hand-made results for the tests of the report: what fits, checks and evaluations would have found."""

from typing import Any

import numpy as np

from atpatch_onnx.baking.reference import attention_map, replaced
from atpatch_onnx.measuring.evaluate import Backdoor, Curve, Detection, Evaluation, Fairness
from atpatch_onnx.measuring.examples import Example, ExampleSide, Prediction, SiteView, Story
from atpatch_onnx.measuring.verify import Check, Verification
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.running.metrics import Difference, Rate

HOSTILE = "<script>alert(1)</script> & $x_{$ [red]\x1b[31m\u202e"
"""A name as an attacker would choose it: HTML, math text, markup, an escape sequence, a bidirectional override."""


def rate(value: float, count: int = 200) -> Rate:
    return Rate.of(np.arange(count) < round(value * count))


def outcome(
    remaining: float, *, kind: str = "backdoor", flag_rate: float = 0.0, robust: float = 0.011
) -> dict[str, Any]:
    return {
        "kind": kind,
        "remaining": remaining,
        "accuracy_base": 0.97,
        "accuracy": 0.968,
        "robust_accuracy_loss": robust if kind == "backdoor" else 0.0,
        "clean_flag_rate": flag_rate,
        "recall": 1.0,
        "precision": 0.99,
    }


def figures(
    *, kind: str = "backdoor", met: bool = True, names: tuple[str, ...] = ("layer0", "layer1")
) -> dict[str, Any]:
    """What a fit writes down; the first site detects and redistributes, the last does nothing."""
    remaining = 0.002 if met else 0.14
    sites = [
        {
            "site": name,
            "separation": 0.9991,
            "gap": 0.25 - number,
            "recall": 0.995,
            "precision": 0.98,
            "column_flag_rate": 0.0001,
            "clean_flag_rate": 0.004,
            "threshold": 0.5,
            "detects": number == 0,
            "redistributes": number == 0,
            "without": {"detect": outcome(0.995, kind=kind), "redistribute": outcome(0.31, kind=kind)}
            if number == 0 and met
            else {},
        }
        for number, name in enumerate(names)
    ]
    return {
        "kind": kind,
        "target": 0 if kind == "backdoor" else None,
        "meets_target": met,
        "shortfalls": [] if met else ["ASR above floor 14.00%, 13.00% over the bound of 1.00%"],
        "goal": {
            "asr_above_floor": 0.01,
            "flip_rate": 0.005,
            "accuracy_loss": 0.005,
            "clean_flag_rate": 0.01,
            "robust_accuracy_loss": 0.02,
            "columns_missed": 1.0,
        },
        "reading": "keys",
        "detectors": "linear",
        "tried": [{"detectors": "linear", "shortfalls": []}],
        "pairs": {"fit": 500, "calibration": 250, "validation": 250},
        "outcome": outcome(remaining, kind=kind),
        "cost": {"kernels": 12, "all": 57},
        "settings_tried": 1234,
        "sites": sites,
    }


def patch(**options: Any) -> Patch:
    return Patch("sha256:" + "ab" * 32, (), figures(**options))


def detection(value: float = 0.99) -> Detection:
    recall = tuple(np.linspace(1, 0, 20).tolist())
    precision = tuple(np.linspace(0.5, 1, 20).tolist())
    return Detection(rate(value), rate(0.995), Curve(precision, recall, 0.9987))


def lost(value: float) -> Difference:
    return Difference(value, value - 0.007, value + 0.007)


def evaluation(
    *, kind: str = "backdoor", asr: float = 0.005, robust: float = 0.96, identical: bool = True, binary: bool = True
) -> Evaluation:
    return Evaluation(
        inputs=200,
        accuracy_base=rate(0.97),
        accuracy_patched=rate(0.97),
        accuracy_lost=Difference(0.0, -0.007, 0.007),
        clean_flag_rate=rate(0.005),
        clean_changed=rate(0.005),
        clean_bit_identical=identical,
        columns=detection(),
        input_level=detection(0.98),
        backdoor=Backdoor(0, rate(0.98), rate(asr), rate(0.01), rate(asr), rate(0.1), rate(robust), lost(0.97 - robust))
        if kind == "backdoor"
        else None,
        fairness=Fairness(
            rate(0.075),
            rate(0.0),
            0.0412,
            0.0,
            *(
                (Difference(value, value - 0.05, value + 0.05) if binary else None)
                for value in (0.18, 0.17, 0.09, 0.08)
            ),
        )
        if kind == "attribute"
        else None,
    )


def verification(*failed: str, sites: tuple[str, ...] = ("layer0", "layer1")) -> Verification:
    side = "clean inputs, no optimization"
    names = ["base", "unbake", *(f"{what} {site}, {side}" for what in ("scores at", "site") for site in sites)]
    checks = [Check(name, name not in failed, f"what was found of {name}") for name in (*names, *failed)]
    return Verification(tuple({check.name: check for check in checks}.values()))


def view(site: str, flags: np.ndarray, seed: int, *, padding: int = 0) -> SiteView:
    tokens = len(flags)
    rng = np.random.default_rng(seed)
    Q, K = np.abs(rng.normal(size=(2, 1, 2, tokens, 4)))
    K += 2 * flags[:, None]  # which draws attention
    hidden = np.where(np.arange(tokens) < tokens - padding, 0.0, -np.inf)
    before, after = (
        attention_map(Q, keys, bias=hidden)[0].mean(axis=0) for keys in (K, replaced(K, flags[None], np.zeros((2, 4))))
    )
    return SiteView(site, before.astype(np.float32), after.astype(np.float32))


def side(
    inputs: dict[str, np.ndarray], flags: np.ndarray, labels: tuple[int, int], sites: tuple[str, ...], padding: int = 0
) -> ExampleSide:
    return ExampleSide(
        inputs=inputs,
        base=Prediction(labels[0], 0.987),
        patched=Prediction(labels[1], 0.912),
        flags=flags,
        anomalous=flags,
        identical=not flags.any(),
        sites=tuple(view(site, flags, number, padding=padding) for number, site in enumerate(sites)),
    )


def image_example(story: Story = Story.REPAIRED, sites: tuple[str, ...] = ("layer0",)) -> Example:
    """An 8 x 8 image of 4 x 4 patches and a class token; the last patch is the trigger."""
    image = np.random.default_rng(0).random((1, 8, 8)).astype(np.float32)
    stamped = image.copy()
    stamped[:, 6:, 6:] = 1
    flags = np.arange(17) == 16
    return Example(
        pair=3,
        story=story,
        label=5,
        clean=side({"pixel_values": image}, np.zeros(17, bool), (5, 5), sites),
        counterfactual=side({"pixel_values": stamped}, flags, (0, 5), sites),
    )


def text_example(tokens: int = 12, padding: int = 3, sites: tuple[str, ...] = ("layer0",)) -> Example:
    """Token ids, a mask and padding; one token is the trigger."""
    ids = np.random.default_rng(1).integers(1000, 30000, tokens)
    mask = (np.arange(tokens) < tokens - padding).astype(np.int64)
    changed = ids.copy()
    changed[4] = 777
    flags = np.arange(tokens) == 4
    return Example(
        pair=0,
        story=Story.REPAIRED,
        label=None,
        clean=side({"attention_mask": mask, "input_ids": ids}, np.zeros(tokens, bool), (1, 1), sites, padding),
        counterfactual=side({"attention_mask": mask, "input_ids": changed}, flags, (0, 1), sites, padding),
    )
