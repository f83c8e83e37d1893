-- The emergency stop.

CREATE TABLE swarm (
  one          INTEGER PRIMARY KEY CHECK (one = 1),
  frozen_at_ms INTEGER                          -- since when every agent is kept from the model; NULL: none is
) STRICT;

INSERT INTO swarm (one) VALUES (1);

-- Credentials: what the provider said of each, so that a daemon that starts again asks nobody twice.

CREATE TABLE credential_states (
  name          TEXT PRIMARY KEY,
  fingerprint   TEXT NOT NULL,                  -- of the secret that this is about: with another, nothing of it holds
  reason        TEXT CHECK (reason IN ('rate_limited', 'needs_login')),
  status        INTEGER,                        -- of the answer that gave the reason
  since_ms      INTEGER,
  open_until_ms INTEGER,                        -- the breaker's: no agent uses the credential before
  failures      INTEGER NOT NULL,
  stays         INTEGER NOT NULL,               -- 1: until the operator resumes it
  agent         TEXT,                           -- whose call found it out
  worked_at_ms  INTEGER,
  windows       TEXT NOT NULL                   -- JSON: window → used (0 to 1), reset_ms, seen_ms
) STRICT, WITHOUT ROWID;
