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

-- Spend: what calls to the model cost, and how much they may.

-- A call that reached the provider, as the relay saw it. What set it off stands here too: messages are forgotten first.
CREATE TABLE charges (
  id                    INTEGER PRIMARY KEY AUTOINCREMENT,
  at_ms                 INTEGER NOT NULL,        -- when it ended
  agent                 TEXT NOT NULL,
  turn_id               INTEGER,                 -- the turn that ran when it began; NULL: none did
  credential            TEXT NOT NULL,           -- its name
  model                 TEXT,                    -- as the provider names it; in the counts NULL is unknown, too
  status                INTEGER NOT NULL,        -- of the provider's answer; 0: there was none
  input_tokens          INTEGER,
  output_tokens         INTEGER,
  cache_write_5m_tokens INTEGER,
  cache_write_1h_tokens INTEGER,
  cache_read_tokens     INTEGER,
  cost_micro_usd        INTEGER NOT NULL,
  estimated             INTEGER NOT NULL,        -- a count or the price of the model is not known
  complete              INTEGER NOT NULL,        -- the answer was passed on to its end
  cause                 TEXT,                    -- of the message that the turn began with
  cause_id              INTEGER,
  chain_id              INTEGER,                 -- the message that the chain of causes began with
  root                  TEXT NOT NULL            -- whose that was: operator, schedule ID, agent NAME, system, no turn
) STRICT;

CREATE INDEX charges_by_time ON charges (at_ms);
CREATE INDEX charges_by_turn ON charges (turn_id) WHERE turn_id IS NOT NULL;

-- The sums of each day, which stay when their charges are forgotten.
CREATE TABLE spend_days (
  day                   INTEGER NOT NULL,        -- days since 1970, UTC
  agent                 TEXT NOT NULL,
  model                 TEXT NOT NULL,           -- '': unknown
  root                  TEXT NOT NULL,
  calls                 INTEGER NOT NULL,
  unknown_calls         INTEGER NOT NULL,        -- those whose input or output is not known: in the sums it is not
  input_tokens          INTEGER NOT NULL,
  output_tokens         INTEGER NOT NULL,
  cache_write_5m_tokens INTEGER NOT NULL,
  cache_write_1h_tokens INTEGER NOT NULL,
  cache_read_tokens     INTEGER NOT NULL,
  cost_micro_usd        INTEGER NOT NULL,
  estimated_micro_usd   INTEGER NOT NULL,        -- of that
  PRIMARY KEY (day, agent, model, root)
) STRICT, WITHOUT ROWID;

CREATE TABLE budgets (
  scope        TEXT NOT NULL,                    -- an agent, or *: the hive
  kind         TEXT NOT NULL CHECK (kind IN ('day', 'total', 'window_5h', 'window_7d')),
  amount       INTEGER NOT NULL CHECK (amount > 0),  -- micro-USD; of a window percent
  warn_percent INTEGER NOT NULL,
  warned_day   INTEGER,                          -- the last day on which it was told that so much is used
  spent_day    INTEGER,                          -- and that all is
  set_at_ms    INTEGER NOT NULL,
  PRIMARY KEY (scope, kind)
) STRICT, WITHOUT ROWID;

ALTER TABLE turns ADD COLUMN reserved_micro_usd INTEGER NOT NULL DEFAULT 0;  -- counts against budgets while it runs
ALTER TABLE turns ADD COLUMN cost_micro_usd INTEGER;                         -- of its calls; NULL: it made none

-- Work that outlives a turn: commands that an agent's harness runs in the background, as it claims.

CREATE TABLE background_works (
  agent       TEXT NOT NULL REFERENCES agents (name),
  work        TEXT NOT NULL,                    -- chosen by the harness: who tells of it again tells of the same
  turn_id     INTEGER,                          -- the turn that began it; NULL: it named none of its agent's
  command     TEXT NOT NULL,                    -- shortened
  note        TEXT NOT NULL,
  output      TEXT NOT NULL,                    -- the path of its log, as the agent sees it
  state       TEXT NOT NULL CHECK (state IN ('running', 'ended', 'timed_out', 'cut_off')),
  begun_at_ms INTEGER NOT NULL,
  ended_at_ms INTEGER,
  message_id  INTEGER,                          -- what its agent was woken with
  PRIMARY KEY (agent, work),
  CHECK ((state = 'running') = (ended_at_ms IS NULL))
) STRICT, WITHOUT ROWID;

CREATE INDEX background_works_running ON background_works (agent) WHERE state = 'running';
CREATE INDEX background_works_ended ON background_works (ended_at_ms) WHERE ended_at_ms IS NOT NULL;

-- Context and errands: how full an agent's session is, and what is to be done with it in a turn without a message.

ALTER TABLE agents ADD COLUMN context_tokens INTEGER;              -- of its session; NULL: nobody knows
ALTER TABLE agents ADD COLUMN context_window INTEGER;              -- how many fit
ALTER TABLE agents ADD COLUMN errand TEXT CHECK (errand IN ('compact', 'save_and_compact'));  -- its next turn's
ALTER TABLE agents ADD COLUMN errand_by TEXT;                      -- operator or system
ALTER TABLE agents ADD COLUMN errand_rest INTEGER NOT NULL DEFAULT 0;  -- turns that end before a full context sets another
ALTER TABLE agents ADD COLUMN new_session_turn INTEGER NOT NULL DEFAULT 0;  -- no turn up to it brings its session back
ALTER TABLE agents ADD COLUMN chosen_model TEXT;                   -- by the operator, in the place of agent.toml's
ALTER TABLE agents ADD COLUMN chosen_effort TEXT;
ALTER TABLE turns ADD COLUMN errand TEXT;                          -- of a turn without a message
ALTER TABLE turns ADD COLUMN errand_by TEXT;
ALTER TABLE turns ADD COLUMN reason TEXT;                          -- why it did not end well: a word for `error`

-- Records of turns: what each was given, so that with its lines it can be shown whole, and replayed.

CREATE TABLE turn_records (
  turn_id       INTEGER PRIMARY KEY REFERENCES turns (id),
  agent         TEXT NOT NULL,
  at_ms         INTEGER NOT NULL,
  given         TEXT NOT NULL,                  -- JSON: the lease as its harness got it, without the body and the prompt
  prompt_sha256 TEXT NOT NULL REFERENCES turn_prompts (sha256),
  asked_sha256  TEXT                            -- of what the harness told the program, as it claims
) STRICT;

CREATE INDEX turn_records_by_agent ON turn_records (agent, turn_id);
CREATE INDEX turn_records_by_age ON turn_records (at_ms);
CREATE INDEX turn_records_by_prompt ON turn_records (prompt_sha256);

-- The prompts of settings: many turns have the same.
CREATE TABLE turn_prompts (
  sha256 TEXT PRIMARY KEY,
  text   TEXT NOT NULL
) STRICT, WITHOUT ROWID;
