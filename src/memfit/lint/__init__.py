"""Configurations of other libraries: parsed, checked against rules, carried over to a plan."""
