"""Memory-saving techniques. A module defines one or several as `Technique` objects (base.py). registry.py
lists all and says which can be combined."""
