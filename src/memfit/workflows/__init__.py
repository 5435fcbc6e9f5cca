"""Workflows: each module calls the stages in order for one command."""
