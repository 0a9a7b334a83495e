"""How things run: targets, backends, plans, the engine. Production imports this folder and nothing else of ours."""
