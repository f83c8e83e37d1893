"""The kinds of changes that are approved: a module for each, and what they have in common in kind.py."""
