-- Questions, reminders and schedules: what waits for somebody's word, or for an instant.

CREATE TABLE questions (
  id            INTEGER PRIMARY KEY AUTOINCREMENT,
  asker         TEXT NOT NULL,
  answerer      TEXT NOT NULL,               -- an agent, or operator: whom it was put to
  text          TEXT NOT NULL,
  options       TEXT NOT NULL,               -- a JSON list; empty: any text is an answer
  multi         INTEGER NOT NULL,            -- several options may be chosen
  free_text     INTEGER NOT NULL,            -- text of one's own is an answer too
  message_id    INTEGER NOT NULL,            -- the message that it was put with
  state         TEXT NOT NULL CHECK (state IN ('open', 'answered', 'expired', 'cancelled', 'dropped')),
  asked_at_ms   INTEGER NOT NULL,
  expires_at_ms INTEGER NOT NULL,
  settled_at_ms INTEGER,
  choices       TEXT,                        -- of the answer: a JSON list
  answer        TEXT,                        -- its text; NULL when options alone were chosen
  answer_id     INTEGER,                     -- the message that brought it
  CHECK ((state = 'open') = (settled_at_ms IS NULL))
) STRICT;

CREATE INDEX questions_by_message ON questions (message_id);
CREATE INDEX questions_by_answer ON questions (answer_id) WHERE answer_id IS NOT NULL;
CREATE INDEX questions_open ON questions (expires_at_ms) WHERE state = 'open';
CREATE INDEX questions_to ON questions (answerer) WHERE state = 'open';
CREATE INDEX questions_from ON questions (asker) WHERE state = 'open';

CREATE TABLE reminders (
  id            INTEGER PRIMARY KEY AUTOINCREMENT,
  agent         TEXT NOT NULL REFERENCES agents (name),
  body          TEXT NOT NULL,
  set_at_ms     INTEGER NOT NULL,
  due_at_ms     INTEGER NOT NULL,
  chain_id      INTEGER,                     -- of the turn that set it, when it is due soon enough to belong to that
  hops          INTEGER NOT NULL,            -- of the message that it will be
  state         TEXT NOT NULL CHECK (state IN ('open', 'due', 'fired', 'cancelled')),  -- due: it waits for room
  settled_at_ms INTEGER,
  message_id    INTEGER                      -- the firing
) STRICT;

CREATE INDEX reminders_open ON reminders (due_at_ms) WHERE state = 'open';
CREATE INDEX reminders_due ON reminders (agent, due_at_ms) WHERE state = 'due';
CREATE INDEX reminders_settled ON reminders (settled_at_ms) WHERE settled_at_ms IS NOT NULL;
CREATE INDEX reminders_of ON reminders (agent) WHERE state IN ('open', 'due');

CREATE TABLE schedules (
  id            INTEGER PRIMARY KEY AUTOINCREMENT,
  agent         TEXT NOT NULL REFERENCES agents (name),
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

CREATE INDEX schedules_next ON schedules (next_at_ms) WHERE state = 'on';
CREATE INDEX schedules_moved ON schedules (moved_at_ms) WHERE state = 'on';

-- Each due instant of a schedule fires once, whatever the clock does.
CREATE TABLE schedule_firings (
  id          INTEGER PRIMARY KEY,
  schedule_id INTEGER NOT NULL REFERENCES schedules (id),
  due_at_ms   INTEGER NOT NULL,
  message_id  INTEGER,                       -- NULL: it was refused, the inbox being full
  UNIQUE (schedule_id, due_at_ms)
) STRICT;

ALTER TABLE agents ADD COLUMN status TEXT;           -- what the agent says that it is about
ALTER TABLE agents ADD COLUMN status_at_ms INTEGER;
