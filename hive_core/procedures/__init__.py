"""Floor 4: what takes several services and adapters, step by step, and is resumed when the daemon starts again."""
