"""Turn (Trace, Machine, Calibration) into an Estimate, by arithmetic only.

Nothing here loads torch.
"""
