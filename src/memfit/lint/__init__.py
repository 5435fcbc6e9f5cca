"""Read configurations of other libraries: parse them, check them against rules, and convert them to a
plan."""
