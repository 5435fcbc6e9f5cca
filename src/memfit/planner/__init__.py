"""Plan search: generate plans, price them, select one and explain the choice, for one device or several."""
