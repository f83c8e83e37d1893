-- The gate: more kinds of approvals, more ends of them, and what their cards show besides. The kinds are the code's to
-- know, so that the next one needs no other table.

CREATE TABLE approvals_new (
  id             INTEGER PRIMARY KEY AUTOINCREMENT,
  kind           TEXT NOT NULL,
  agent          TEXT NOT NULL,
  requested_by   TEXT NOT NULL,
  reason         TEXT NOT NULL,
  payload        TEXT NOT NULL,              -- what will be done, whole: JSON, each kind's own
  effect         TEXT,                       -- what that changes, as the card shows it: JSON
  digest         TEXT NOT NULL,              -- of kind, agent, payload and effect: what a click is bound to
  state          TEXT NOT NULL
                 CHECK (state IN ('pending', 'approved', 'denied', 'expired', 'cancelled', 'done', 'failed')),
  step           TEXT,                       -- how far it is carried out, while it is approved
  step_at_ms     INTEGER,
  proof          TEXT,                       -- of one that is done: how what it changed was found well
  note           TEXT,
  requested_at_ms INTEGER NOT NULL,
  expires_at_ms  INTEGER NOT NULL,
  resolved_at_ms INTEGER,
  resolved_by    TEXT,
  resolved_from  TEXT,                       -- the door that the click came through
  rule           TEXT                        -- of the policy, which let it pass without a click
) STRICT;

INSERT INTO approvals_new (
  id, kind, agent, requested_by, reason, payload, digest, state, note, requested_at_ms, expires_at_ms, resolved_at_ms,
  resolved_by
)
SELECT
  id, kind, agent, requested_by, reason, payload, digest, state, note, requested_at_ms,
  max(requested_at_ms, 1000 * CAST(strftime('%s', 'now') AS INTEGER)) + 7 * 86400 * 1000, resolved_at_ms, resolved_by
FROM approvals;

DROP TABLE approvals;
ALTER TABLE approvals_new RENAME TO approvals;

-- One card for one change: the same request twice is the same card.
CREATE UNIQUE INDEX approvals_open ON approvals (kind, agent, digest) WHERE state IN ('pending', 'approved');
CREATE INDEX approvals_pending ON approvals (id) WHERE state = 'pending';
CREATE INDEX approvals_approved ON approvals (id) WHERE state = 'approved';
CREATE INDEX approvals_expiring ON approvals (expires_at_ms) WHERE state = 'pending';
CREATE INDEX approvals_resolved ON approvals (id) WHERE state != 'pending';
CREATE INDEX approvals_of ON approvals (agent, id);

-- A commit that waits is not asked for twice; what it is, is in the payload, which may be long.
CREATE INDEX approvals_commits ON approvals (agent, json_extract(payload, '$.sha'))
WHERE kind = 'apply_commit' AND state IN ('pending', 'approved');

-- Policy: how many passed by a rule in a day.
CREATE INDEX approvals_by_rule ON approvals (rule, resolved_at_ms) WHERE rule IS NOT NULL;

-- Agents: who said last what is wanted of one, which hm1nd may undo unless it was the operator.
ALTER TABLE agents ADD COLUMN wanted_by TEXT;

-- Agents: what they say of themselves.
ALTER TABLE agents ADD COLUMN pronouns TEXT;
ALTER TABLE agents ADD COLUMN icon TEXT;
ALTER TABLE agents ADD COLUMN about TEXT;

-- Configurations of agents to be: their repositories are there, and nothing of them runs yet.
CREATE TABLE configured (
  name         TEXT PRIMARY KEY,
  sha          TEXT NOT NULL,                -- of the first commit
  requested_by TEXT NOT NULL,
  icon         TEXT,
  at_ms        INTEGER NOT NULL
) STRICT;
