"""The built-in jobs with their models and data."""
