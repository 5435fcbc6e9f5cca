"""Other memory predictors, run beside memfit on the same rows."""
