"""What runs beside a coding agent: the turn loop, the bridge to the hive's tools, and a stand-in agent.

It imports trio, the standard library and hive_core.protocol alone; `mcp` and `rehearse` not even trio.
"""
