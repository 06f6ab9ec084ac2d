"""How runs are started: command lines, Hydra, sweeps, errors in one line."""
