"""Find the modules that must compute in float32 by running each one in the requested precision."""
