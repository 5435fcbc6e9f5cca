"""Check whether a plan was applied: a monitor watches one training step of a prepared model, which is one to
which a plan should have been applied, and checks compare the step with the plan."""
