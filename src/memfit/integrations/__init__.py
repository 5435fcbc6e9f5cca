"""memfit inside the training loops of others: callbacks that predict, look whether the plan was applied, and
record predicted against measured. Each module loads the library that it is for."""
