"""Public training scripts, unmodified: the list, their data, their measurement and the page."""
