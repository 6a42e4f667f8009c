"""From a model and its pairs to a patch: features, detectors, thresholds, and the search for sites."""
