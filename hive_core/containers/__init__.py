"""Drivers: what starts an agent in a container of its own, finds it again, and ends it."""
