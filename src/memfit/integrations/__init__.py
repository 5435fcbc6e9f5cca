"""Callbacks for the training loops of Lightning and Hugging Face. They predict the training step, check
whether the plan was applied, and write predicted and measured peaks of memory to a file. Each module but
record.py imports the library that it supports."""
