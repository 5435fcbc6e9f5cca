"""Was the plan applied? A monitor watches one step of a prepared model; checks compare it with the plan."""
