"""Stage 9: a launch as files to hand over: what `run` would execute, for other machines and other programs.

A target is a function of a Handover: ``torchrun.py`` is what every node executes, a cluster's files start it.
"""
