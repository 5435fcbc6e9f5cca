"""Start trainings on this machine and on clusters."""
