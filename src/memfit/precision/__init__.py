"""Which modules must compute in float32, found by running each in the precision asked for."""
