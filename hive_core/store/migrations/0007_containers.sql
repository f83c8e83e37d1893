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
  last_words        TEXT,                        -- what it printed then
  generation        TEXT                         -- the shape of the one that was started last
) STRICT, WITHOUT ROWID;

-- Disk use: agents whose directories take more than their quota, which was told.

CREATE TABLE disk_warnings (
  agent TEXT PRIMARY KEY,
  at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Tombstones: agents that were destroyed, whose directories are kept. What names an agent in history names no row any more.

CREATE TABLE tombstones (
  id              INTEGER PRIMARY KEY AUTOINCREMENT,
  name            TEXT NOT NULL,
  label           TEXT NOT NULL UNIQUE,      -- NAME@INSTANT, and its directory's name
  state           TEXT NOT NULL CHECK (state IN ('destroying', 'kept', 'reviving', 'purging')),
  at_once         INTEGER NOT NULL,          -- 1: the turn that runs is not waited for
  agent           TEXT,                      -- JSON: its row of agents as it was; NULL while it still is there
  bytes           INTEGER,                   -- that its directories take
  destroyed_by    TEXT NOT NULL,
  destroyed_at_ms INTEGER NOT NULL
) STRICT;

CREATE UNIQUE INDEX tombstones_under_way ON tombstones (name) WHERE state IN ('destroying', 'reviving');

CREATE TABLE new_turns (
  id                 INTEGER PRIMARY KEY AUTOINCREMENT,
  agent              TEXT NOT NULL,
  fence              TEXT NOT NULL,               -- chosen by the harness: who asks again with it gets the same turn
  state              TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed', 'waiting', 'lost', 'cancelled')),
  message_id         INTEGER,                     -- the message it began with; NULL on an errand, and in old turns
  chain_id           INTEGER,                     -- of the message with the most hops that it leased
  hops               INTEGER NOT NULL DEFAULT 0,
  started_at_ms      INTEGER NOT NULL,
  ended_at_ms        INTEGER,
  error              TEXT,
  usage              TEXT,
  lines              INTEGER NOT NULL DEFAULT 0,  -- how many lines arrived; lines over the bound are counted, not kept
  reserved_micro_usd INTEGER NOT NULL DEFAULT 0,  -- counts against budgets while it runs
  cost_micro_usd     INTEGER,                     -- of its calls; NULL: it made none
  errand             TEXT,                        -- of a turn without a message
  errand_by          TEXT,
  reason             TEXT,                        -- why it did not end well: a word for `error`
  CHECK ((state = 'running') = (ended_at_ms IS NULL))
) STRICT;

INSERT INTO new_turns (
  id, agent, fence, state, message_id, chain_id, hops, started_at_ms, ended_at_ms, error, usage, lines,
  reserved_micro_usd, cost_micro_usd, errand, errand_by, reason
) SELECT
  id, agent, fence, state, message_id, chain_id, hops, started_at_ms, ended_at_ms, error, usage, lines,
  reserved_micro_usd, cost_micro_usd, errand, errand_by, reason
FROM turns;

CREATE TABLE new_reminders (
  id             INTEGER PRIMARY KEY AUTOINCREMENT,
  agent          TEXT NOT NULL,
  body           TEXT NOT NULL,
  set_at_ms      INTEGER NOT NULL,
  due_at_ms      INTEGER NOT NULL,
  chain_id       INTEGER,                     -- of the turn that set it, when it is due soon enough to belong to that
  hops           INTEGER NOT NULL,            -- of the message that it will be
  state          TEXT NOT NULL CHECK (state IN ('open', 'due', 'fired', 'cancelled')),  -- due: it waits for room
  settled_at_ms  INTEGER,
  message_id     INTEGER,                     -- the firing
  counts_from_ms INTEGER                      -- of one after so many seconds: when its time began by the clock of then
) STRICT;

INSERT INTO new_reminders (
  id, agent, body, set_at_ms, due_at_ms, chain_id, hops, state, settled_at_ms, message_id, counts_from_ms
) SELECT id, agent, body, set_at_ms, due_at_ms, chain_id, hops, state, settled_at_ms, message_id, counts_from_ms
FROM reminders;

CREATE TABLE new_schedules (
  id            INTEGER PRIMARY KEY AUTOINCREMENT,
  agent         TEXT NOT NULL,
  body          TEXT NOT NULL,
  cron          TEXT,                        -- five fields, read on the clocks of `zone`
  zone          TEXT,
  every_ms      INTEGER,                     -- or an interval, counted from created_at_ms
  state         TEXT NOT NULL CHECK (state IN ('on', 'paused', 'removed')),
  note          TEXT,                        -- why the hive itself paused it
  created_at_ms INTEGER NOT NULL,
  next_at_ms    INTEGER,                     -- the next firing; moved by the transaction that stores a firing
  moved_at_ms   INTEGER NOT NULL,            -- when that was worked out: a clock before it was set back; or removed
  CHECK ((cron IS NULL) = (zone IS NULL) AND (cron IS NULL) != (every_ms IS NULL)),
  CHECK ((state = 'on') = (next_at_ms IS NOT NULL))
) STRICT;

INSERT INTO new_schedules (
  id, agent, body, cron, zone, every_ms, state, note, created_at_ms, next_at_ms, moved_at_ms
) SELECT id, agent, body, cron, zone, every_ms, state, note, created_at_ms, next_at_ms, moved_at_ms FROM schedules;

CREATE TABLE new_background_works (
  agent       TEXT NOT NULL,
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

INSERT INTO new_background_works (
  agent, work, turn_id, command, note, output, state, begun_at_ms, ended_at_ms, message_id
) SELECT agent, work, turn_id, command, note, output, state, begun_at_ms, ended_at_ms, message_id FROM background_works;

-- No number is given twice, also where what had the last ones is gone.
DELETE FROM sqlite_sequence WHERE name IN ('new_turns', 'new_reminders', 'new_schedules');
INSERT INTO sqlite_sequence (name, seq)
SELECT 'new_' || name, seq FROM sqlite_sequence WHERE name IN ('turns', 'reminders', 'schedules');

DROP TABLE turns;
ALTER TABLE new_turns RENAME TO turns;
CREATE UNIQUE INDEX turns_running ON turns (agent) WHERE state = 'running';
CREATE INDEX turns_by_agent ON turns (agent, id);

DROP TABLE reminders;
ALTER TABLE new_reminders RENAME TO reminders;
CREATE INDEX reminders_open ON reminders (due_at_ms) WHERE state = 'open';
CREATE INDEX reminders_due ON reminders (agent, due_at_ms) WHERE state = 'due';
CREATE INDEX reminders_settled ON reminders (settled_at_ms) WHERE settled_at_ms IS NOT NULL;
CREATE INDEX reminders_of ON reminders (agent) WHERE state IN ('open', 'due');
CREATE INDEX reminders_set ON reminders (set_at_ms) WHERE state = 'open';

DROP TABLE schedules;
ALTER TABLE new_schedules RENAME TO schedules;
CREATE INDEX schedules_next ON schedules (next_at_ms) WHERE state = 'on';
CREATE INDEX schedules_moved ON schedules (moved_at_ms) WHERE state = 'on';

DROP TABLE background_works;
ALTER TABLE new_background_works RENAME TO background_works;
CREATE INDEX background_works_running ON background_works (agent) WHERE state = 'running';
CREATE INDEX background_works_ended ON background_works (ended_at_ms) WHERE ended_at_ms IS NOT NULL;
