"""Memory, energy and the memory cap, read inside the process that trains."""
