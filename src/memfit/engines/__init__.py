"""Stage 4a: render a plan as the text with which an engine is started. No engine is imported here."""
