"""How a router learns: objectives, learners, and the run that survives what happens to it."""
