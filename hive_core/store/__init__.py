"""Floor 2: one sqlite file behind one small door (see door.py)."""
