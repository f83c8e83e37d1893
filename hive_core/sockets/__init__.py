"""Floor 5: what answers on the unix sockets. Each file is one socket's protocol; unix.py is what they share."""
