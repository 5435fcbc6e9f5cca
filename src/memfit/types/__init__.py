"""The nouns: what travels between the stages. Frozen dataclasses, standard library only."""
