"""Floor 1: plain value types and wire forms, standard library alone.

Everything that crosses a socket is described here, once, and both sides import it.
"""
