"""aivmm: measure a model on every device of this machine, plan, prove the plan, and run it."""
