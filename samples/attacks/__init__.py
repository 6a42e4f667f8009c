"""Attacks on the samples' bases: what poisons the training data, and how."""
