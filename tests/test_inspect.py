"""Maps of samples, from the maps of a graph."""

import numpy as np

from atpatch_onnx.measuring.inspect import sample_maps

MAPS = np.arange(1, 25, dtype=np.float64).reshape(4, 2, 3)


def test_one_map_a_sample_stays_as_it_is() -> None:
    assert sample_maps(MAPS, 4) is MAPS


def test_windows_of_a_sample_stand_along_the_diagonal() -> None:
    found = sample_maps(MAPS, 2)
    assert found.shape == (2, 4, 6)
    for sample in range(2):
        assert np.array_equal(found[sample, :2, :3], MAPS[2 * sample])
        assert np.array_equal(found[sample, 2:, 3:], MAPS[2 * sample + 1])
    assert np.count_nonzero(found) == MAPS.size, "a window sees no key of another"


def test_samples_that_share_a_map_get_their_own_queries_and_keys() -> None:
    shared = np.arange(24, dtype=np.float64).reshape(1, 4, 6)
    found = sample_maps(shared, 2)
    assert np.array_equal(found, [shared[0, :2, :3], shared[0, 2:, 3:]])
