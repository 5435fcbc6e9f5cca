"""Plan search: generate plans, predict them, select one and explain the choice, for one device or several."""
