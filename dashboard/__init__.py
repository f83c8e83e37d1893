"""What the operator sees: pages, their live fragments, and the forms that act. Stands beside hive_core.sockets."""
