-- Uids: the range of 65,536 that an agent's container has on the host, allocated once and kept.

CREATE TABLE uid_ranges (
  agent     TEXT PRIMARY KEY,
  first_uid INTEGER NOT NULL UNIQUE
) STRICT, WITHOUT ROWID;
