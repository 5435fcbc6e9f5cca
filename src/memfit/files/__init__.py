"""Files on disk: temporary folders that do not outlive their process, writing that replaces a file as a
whole, and reading with limits."""
