"""What needs root, for a daemon that has no privileges: a small process of its own, asked over one socket."""
