-- The first schema. Times are milliseconds since 1970 UTC. JSON columns hold objects.

CREATE TABLE agents (
  name          TEXT PRIMARY KEY,
  role          TEXT NOT NULL CHECK (role IN ('agent', 'manager')),
  wanted        TEXT NOT NULL CHECK (wanted IN ('up', 'paused', 'down')),
  page_port     INTEGER NOT NULL UNIQUE,
  deployed_sha  TEXT,                        -- NULL until its repositories exist
  settings      TEXT,                        -- agent.toml and CLAUDE.md of deployed_sha, parsed; written with it
  session       TEXT,                        -- the program's session to go on with
  created_at_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE messages (
  id          INTEGER PRIMARY KEY AUTOINCREMENT,
  sender      TEXT NOT NULL,
  body        TEXT NOT NULL,
  in_reply_to INTEGER REFERENCES messages (id),
  sent_at_ms  INTEGER NOT NULL
) STRICT;

CREATE TABLE deliveries (
  message_id      INTEGER NOT NULL REFERENCES messages (id),
  recipient       TEXT NOT NULL,
  state           TEXT NOT NULL CHECK (state IN ('queued', 'leased', 'acked', 'dead')),
  attempts        INTEGER NOT NULL DEFAULT 0,
  available_at_ms INTEGER NOT NULL,
  turn_id         INTEGER REFERENCES turns (id),  -- the turn that leases it, or acked it
  PRIMARY KEY (message_id, recipient)
) STRICT, WITHOUT ROWID;

-- What waits, and for whom: small however many messages are old.
CREATE INDEX deliveries_open ON deliveries (recipient, state, message_id) WHERE state IN ('queued', 'leased');
CREATE INDEX deliveries_by_turn ON deliveries (turn_id) WHERE turn_id IS NOT NULL;
CREATE INDEX deliveries_by_recipient ON deliveries (recipient, message_id);

CREATE TABLE turns (
  id            INTEGER PRIMARY KEY AUTOINCREMENT,
  agent         TEXT NOT NULL REFERENCES agents (name),
  fence         TEXT NOT NULL,
  state         TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed', 'waiting', 'lost')),
  started_at_ms INTEGER NOT NULL,
  ended_at_ms   INTEGER,
  error         TEXT,
  usage         TEXT,
  lines         INTEGER NOT NULL DEFAULT 0,  -- how many lines arrived; lines over the bound are counted, not kept
  CHECK ((state = 'running') = (ended_at_ms IS NULL))
) STRICT;

CREATE UNIQUE INDEX turns_running ON turns (agent) WHERE state = 'running';
CREATE INDEX turns_by_agent ON turns (agent, id);

-- The stream of a turn: what the agent's program printed, bounded per turn, per agent and by age.
CREATE TABLE turn_lines (
  id      INTEGER PRIMARY KEY AUTOINCREMENT,
  agent   TEXT NOT NULL,
  turn_id INTEGER NOT NULL REFERENCES turns (id) ON DELETE CASCADE,
  n       INTEGER NOT NULL,
  at_ms   INTEGER NOT NULL,
  line    TEXT NOT NULL,
  UNIQUE (turn_id, n)
) STRICT;

CREATE INDEX turn_lines_by_agent ON turn_lines (agent, id);
CREATE INDEX turn_lines_by_age ON turn_lines (at_ms);

CREATE TABLE approvals (
  id             INTEGER PRIMARY KEY AUTOINCREMENT,
  kind           TEXT NOT NULL CHECK (kind IN ('spawn', 'apply_commit')),
  agent          TEXT NOT NULL,
  requested_by   TEXT NOT NULL,
  reason         TEXT NOT NULL,
  payload        TEXT NOT NULL,              -- what will be done, whole: spawn {persona}, apply_commit {sha, base, diff}
  digest         TEXT NOT NULL,              -- of kind, agent and payload: what a click is bound to
  state          TEXT NOT NULL CHECK (state IN ('pending', 'approved', 'denied', 'done', 'failed')),
  note           TEXT,
  requested_at_ms INTEGER NOT NULL,
  resolved_at_ms INTEGER,
  resolved_by    TEXT
) STRICT;

-- One card for one change: the same request twice is the same card.
CREATE UNIQUE INDEX approvals_open ON approvals (kind, agent, digest) WHERE state IN ('pending', 'approved');

-- The answer of each writing tool call, so that a call sent again gets the first answer and counts once.
CREATE TABLE tool_calls (
  agent  TEXT NOT NULL,
  key    TEXT NOT NULL,
  tool   TEXT NOT NULL,
  result TEXT NOT NULL,
  at_ms  INTEGER NOT NULL,
  PRIMARY KEY (agent, key)
) STRICT, WITHOUT ROWID;

CREATE INDEX tool_calls_by_age ON tool_calls (at_ms);

-- What people did and what changed. Kept.
CREATE TABLE events (
  seq   INTEGER PRIMARY KEY AUTOINCREMENT,
  at_ms INTEGER NOT NULL,
  kind  TEXT NOT NULL,
  actor TEXT NOT NULL,                       -- who did it: an agent, operator, or system
  agent TEXT,                                -- whom it is about
  data  TEXT NOT NULL
) STRICT;

CREATE INDEX events_by_agent ON events (agent, seq);

-- Browsers that are signed in: the digest of each cookie.
CREATE TABLE sign_ins (
  digest        TEXT PRIMARY KEY,
  created_at_ms INTEGER NOT NULL,
  expires_at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
