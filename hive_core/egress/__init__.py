"""The proxy by which agents reach what their `egress` names: a process of its own, since it carries bulk.

It knows agents by the sockets that the daemon hands it, and of each only what it may reach; it has no database and no
secret, resolves names itself, never decrypts, and tells the daemon of every connection.
"""
