"""The cache of `GroupQueryAttention`: old and new keys and values in the order of positions."""

import onnx_ir as ir

from atpatch_onnx.baking.shadow_nodes import axis, ints, joined, length
from atpatch_onnx.baking.shadow_positions import Positions
from atpatch_onnx.graph.insertion import Insertion


def slots_of_keys(at: Insertion, past_key: ir.Value, key: ir.Value, positions: Positions, kv_heads: int) -> ir.Value:
    """Which entry of cache and new keys in a row is at each position: int64 `[batch, kv heads, keys, depth]`.

    A cache may be longer than what a sample has in it, each sample its own; the new keys follow right behind that.
    """
    keys = at.op("Reshape", positions.keys, ints(at, "map/slot_shape", 1, 1, -1, 1), name="map/slot_numbers")
    capacity, new = length(at, past_key, 2, "map/cache_length"), length(at, key, 2, "map/new_length")
    ends = at.op("Add", capacity, new, name="map/both_lengths")
    last = at.op("Sub", ends, ints(at, "map/one_slot", 1), name="map/last_slot")
    moved = at.op("Add", at.op("Sub", keys, positions.past, name="map/among_new"), capacity, name="map/behind_cache")
    moved = at.op("Min", moved, last, name="map/new_slots")  # positions behind a shorter sample's end: hidden anyway
    old = at.op("Less", keys, positions.past, name="map/in_cache")
    slots = at.op("Where", old, keys, moved, name="map/slots_of_keys")
    one_sample = ints(at, "map/slot_heads", 1, kv_heads, 1)
    shape = joined(at, one_sample, length(at, key, 3, "map/key_depth"), 0, "map/slot_size")
    return at.op("Expand", slots, shape, name="map/slots")


def in_slots(at: Insertion, past: ir.Value, new: ir.Value, slots: ir.Value, name: str) -> ir.Value:
    """Keys or values `[batch, kv heads, keys, depth]` in the order of positions, of the cache's and the new ones."""
    both = joined(at, past, new, 2, f"{name}_and_room")
    return at.op("GatherElements", both, slots, name=name, attributes=[axis(2)])
