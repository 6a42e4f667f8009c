"""The words of a report, explained; only those that it uses."""

from collections.abc import Mapping
from typing import Any

from atpatch_onnx.measuring.evaluate import Evaluation

_ALWAYS = (
    ("Attention map", "How much every token (row) attends to every other (column); each row sums to 1."),
    ("Column", "The attention that one token receives from all others."),
    ("Flag", "A token that the detector calls anomalous by its key. Flags travel along to later sites."),
    ("Site", "One attention computation of the model: the unit that is patched."),
    ("Redistribution", "Flagged tokens show a neutral key and hand over a neutral value."),
    ("Neutral key and value", "The means over clean data at a site."),
    ("Counterfactual", "The same input with the trigger, or with the protected attribute changed."),
    ("Floor", "The share of clean inputs that the base sends to the target class anyway."),
    ("Clean flag rate", "The share of clean inputs on which any benign column is flagged."),
    (
        "Interval",
        "95 % interval: what other samples of this size would plausibly have shown. Of shares Wilson's, of accuracy"
        " lost Agresti and Min's for pairs, of differences between groups the bootstrap's.",
    ),
    ("Precision, recall", "The share of flags that are right, and the share of anomalies that are flagged."),
    ("Separation", "Area under the ROC curve of token scores: 1 where anomalous ones are all above benign ones."),
    ("Gap", "The lowest anomalous scores less the largest clean one, in deviations of benign scores."),
)
_BACKDOOR = (
    ("ASR", "Attack success rate: share of inputs of other classes that go to the target class once triggered."),
    ("ASR above floor", "The same, counted only on inputs that the base does not send to the target anyway."),
    ("Robust accuracy", "The share of triggered inputs that are classified as what they truly are."),
)
_ATTRIBUTE = (
    ("UF", "Flip rate: share of inputs whose prediction changes when only the protected attribute changes."),
    ("Confidence gap", "Mean largest change of a class's confidence over the same pairs."),
    ("Demographic parity difference", "Largest difference between groups in how often the positive class is given."),
    ("Equalized odds difference", "Largest difference between groups in true or false positive rate."),
)


def terms(figures: Mapping[str, Any], evaluation: Evaluation | None) -> tuple[tuple[str, str], ...]:
    """Terms and what they mean, in alphabetical order."""
    found = list(_ALWAYS)
    kind = figures.get("kind")
    if kind == "backdoor" or (evaluation is not None and evaluation.backdoor is not None):
        found += _BACKDOOR
    else:
        found = [term for term in found if term[0] != "Floor"]
    if kind == "attribute" or (evaluation is not None and evaluation.fairness is not None):
        found += _ATTRIBUTE
    return tuple(sorted(found, key=lambda term: term[0].lower()))
