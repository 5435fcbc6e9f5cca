"""Which plan: generate plans, price them, select one and explain it, for one device and for many."""
