-- Uids: the range of 65,536 that an agent's container has on the host, allocated once and kept.

CREATE TABLE uid_ranges (
  agent     TEXT PRIMARY KEY,
  first_uid INTEGER NOT NULL UNIQUE
) STRICT, WITHOUT ROWID;

-- Containers: what is remembered of each agent's, so that a daemon that starts again begins nothing anew.

CREATE TABLE container_states (
  agent             TEXT PRIMARY KEY,
  crashes           INTEGER NOT NULL DEFAULT 0,  -- in a row
  crashed_at_ms     INTEGER,                     -- the last time
  next_start_at_ms  INTEGER,                     -- it is not started before
  quarantined_at_ms INTEGER,                     -- since when it is not started any more, until the operator says so
  why               TEXT,                        -- how it ended the last time
  last_words        TEXT                         -- what it printed then
) STRICT, WITHOUT ROWID;
