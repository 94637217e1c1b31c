"""Real engines: a candidate run by what will serve it, in a process and an environment of its own."""
