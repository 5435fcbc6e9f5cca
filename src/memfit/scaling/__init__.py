"""Plans for many devices: priced by the million from a few small traces, the best of them traced whole."""
