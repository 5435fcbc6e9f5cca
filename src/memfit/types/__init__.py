"""The data types that travel between the stages: frozen dataclasses, standard library only."""
