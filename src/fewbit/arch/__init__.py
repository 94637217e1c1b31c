"""Floor 3: facts about model families, and the rewrites that leave a float model equal."""
