"""Stage 4a: a plan as the text an engine is started with. No engine is imported here."""
