"""The six lines of the README: fit a patch for model.onnx from debug.npz, bake it, prove it."""

import atpatch_onnx as atp

model = atp.load("model.onnx")
debug = atp.DebugSet.load("debug.npz")  # or from_pairs, from_trigger, from_attribute
patch = atp.fit(model, debug)
patch.save("fix.safetensors")
atp.save(atp.bake(model, patch, target="cpu"), "patched.onnx")
atp.verify("model.onnx", "patched.onnx", debug).raise_if_failed()
