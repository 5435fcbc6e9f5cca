"""Watch a training while it runs, raise alarms, explain its death and recover from it."""
