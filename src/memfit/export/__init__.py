"""Write a launch as files for a launcher, a cluster or another trainer: they start elsewhere what
`memfit run` would execute here, or a script of the user under the same plan. With a launcher or a cluster,
the engine (memfit.engines) decides which library trains.

A target is a function from a Handover to files. All targets for clusters start ``torchrun.sh`` (torchrun.py)
on every node.
"""
