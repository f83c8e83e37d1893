"""The manager agent: an agent like the others, with a prompt of its own; the host gives it more tools."""
