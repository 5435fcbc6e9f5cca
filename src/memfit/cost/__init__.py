"""Stage 2: arithmetic only. (Trace, Machine, Calibration) to an Estimate; nothing here loads torch."""
