"""Stage 9: write a launch as files. They start what `run` would execute on other machines or by other
programs.

A target is a function from a Handover to files. All targets for clusters start ``torchrun.sh`` (torchrun.py)
on every node.
"""
