"""Weights and training state on disk.

In: parameters by name, or somebody else's weight files. Out: the same, the other way round. A new file format is one
module in `formats/`.
"""
