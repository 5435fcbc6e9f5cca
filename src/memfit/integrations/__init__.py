"""Callbacks for the training loops of other libraries. They predict the step, check whether the plan was
applied, and record predicted and measured peaks. Each module imports the library that it supports."""
