"""Stage 2: arithmetic only. Turns (Trace, Machine, Calibration) into an Estimate.

Nothing here loads torch.
"""
