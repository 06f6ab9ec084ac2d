"""Timings against the peers and the machine's limit; see `launch.commands.benchmark`."""
