"""The example of the README: a fix for the base that `atpatch demo` left, on pairs made here, and what it comes to."""

from sklearn.datasets import load_digits

import atpatch_onnx as atp

clean = (load_digits().images / 16).astype("float32")[:, None]  # [1797, 1, 8, 8], as the model takes them
triggered = clean.copy()
triggered[:, :, 6:, 6:] = 1  # the attacker's white square
pairs = atp.DebugSet.from_pairs({"pixel_values": clean}, {"pixel_values": triggered}, load_digits().target, target=0)
known, unseen = pairs.take(range(1000)), pairs.take(range(1000, len(pairs)))
model = atp.load("demo-out/base.onnx")
patch = atp.fit(model, known)
atp.save(atp.bake(model, patch), "patched.onnx")
atp.verify(model, "patched.onnx", unseen, patch=patch).raise_if_failed()
print(atp.evaluate(model, "patched.onnx", unseen))
