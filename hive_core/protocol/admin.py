"""The version of what is spoken on host.sock; the verbs are in sockets/admin.py."""

PROTOCOL_VERSION = 1
