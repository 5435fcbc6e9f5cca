"""Callbacks for the training loops of other libraries. They predict the training step, check whether the plan
was applied, and record predicted and measured peaks of memory. Each module but record.py imports the library
that it supports."""
