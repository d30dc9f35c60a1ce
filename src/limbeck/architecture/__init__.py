"""Axes of an architecture: found by probing, proved by permutation, ranked by importance, cut."""
