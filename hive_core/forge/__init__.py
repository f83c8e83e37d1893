"""The ways to a forge, a server of repositories with pull requests and issues: one adapter for each API."""
