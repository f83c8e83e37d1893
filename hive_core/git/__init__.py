"""Repositories: what agents write is copied, checked, fetched and tagged, and no git of ours opens it otherwise."""
