"""The host daemon of hyperhive, and `hive`, the operator's command line.

Importing this package imports nothing else: the command line must start in under 100 ms.
"""
