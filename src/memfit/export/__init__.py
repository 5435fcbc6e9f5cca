"""Write a launch as files for a launcher, a cluster or another trainer: they start elsewhere what
`memfit run` would execute here. Which library trains is decided by the engine (memfit.engines).

A target is a function from a Handover to files. All targets for clusters start ``torchrun.sh`` (torchrun.py)
on every node.
"""
