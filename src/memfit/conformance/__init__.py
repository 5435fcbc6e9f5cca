"""Check whether a plan was applied: a monitor watches one step of a prepared model, and checks compare it
with the plan."""
