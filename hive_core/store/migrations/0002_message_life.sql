-- Every message can tell its life: what caused it, who held it, which turns had it and how each ended.

CREATE TABLE new_messages (
  id          INTEGER PRIMARY KEY AUTOINCREMENT,
  sender      TEXT NOT NULL,
  body        TEXT NOT NULL,                 -- whole, or the beginning of one that is kept as a file
  body_bytes  INTEGER NOT NULL,              -- of the whole
  body_sha256 TEXT,                          -- the file that holds the whole; NULL when it stands here
  in_reply_to INTEGER,                       -- may be gone by now: old messages go one by one
  thread_id   INTEGER,                       -- the first message of the thread; NULL in that one
  cause       TEXT NOT NULL CHECK (cause IN ('operator', 'turn', 'reminder', 'schedule', 'system')),
  cause_id    INTEGER,                       -- which turn, reminder or schedule
  chain_id    INTEGER NOT NULL,              -- the message that the chain of causes began with
  hops        INTEGER NOT NULL,              -- how many turns lie between that one and this
  client_id   TEXT,                          -- the sender's own key: the same key is the same message
  to_everyone INTEGER NOT NULL DEFAULT 0 CHECK (to_everyone IN (0, 1)),  -- whom that reached, its deliveries tell
  sent_at_ms  INTEGER NOT NULL
) STRICT;

INSERT INTO new_messages (id, sender, body, body_bytes, in_reply_to, thread_id, cause, chain_id, hops, client_id,
                          sent_at_ms)
WITH RECURSIVE threads (id, root) AS (
  SELECT id, id FROM messages WHERE in_reply_to IS NULL
  UNION ALL
  SELECT messages.id, threads.root FROM messages JOIN threads ON messages.in_reply_to = threads.id
)
SELECT id, sender, body, length(CAST(body AS BLOB)), in_reply_to, nullif(root, id),
       CASE sender WHEN 'operator' THEN 'operator' WHEN 'system' THEN 'system' ELSE 'turn' END, id, 0,
       (SELECT key FROM tool_calls WHERE agent = sender AND tool = 'send' AND result ->> 'message' = messages.id),
       sent_at_ms
FROM messages JOIN threads USING (id) ORDER BY id;

CREATE TABLE new_deliveries (
  message_id      INTEGER NOT NULL REFERENCES messages (id),
  recipient       TEXT NOT NULL,
  sender          TEXT NOT NULL,
  state           TEXT NOT NULL CHECK (state IN ('held', 'queued', 'leased', 'acked', 'dead', 'dropped')),
  attempts        INTEGER NOT NULL DEFAULT 0,     -- how often it was handed to a turn
  failures        INTEGER NOT NULL DEFAULT 0,     -- how many of those turns failed by their own doing
  sent_at_ms      INTEGER NOT NULL,
  available_at_ms INTEGER NOT NULL,               -- queued: not before this instant
  settled_at_ms   INTEGER,                        -- when it was acked, died or was dropped
  turn_id         INTEGER,                        -- the turn that leases it, or had it last: one of its leases
  held            TEXT CHECK (held IN ('hops', 'rate')),  -- why it was held when it was sent
  note            TEXT,                           -- why it died; cancelled, when its turn was
  PRIMARY KEY (message_id, recipient)
) STRICT, WITHOUT ROWID;

INSERT INTO new_deliveries (message_id, recipient, sender, state, attempts, failures, sent_at_ms, available_at_ms,
                            settled_at_ms, turn_id)
SELECT message_id, recipient, sender, state, attempts, max(0, attempts - (state IN ('leased', 'acked'))), sent_at_ms,
       available_at_ms,
       CASE WHEN state IN ('acked', 'dead') THEN available_at_ms END, turn_id
FROM deliveries JOIN messages ON messages.id = message_id;

CREATE TABLE new_turns (
  id            INTEGER PRIMARY KEY AUTOINCREMENT,
  agent         TEXT NOT NULL REFERENCES agents (name),
  fence         TEXT NOT NULL,               -- chosen by the harness: who asks again with it gets the same turn
  state         TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed', 'waiting', 'lost', 'cancelled')),
  message_id    INTEGER,                     -- the message it began with; NULL in turns older than this column
  chain_id      INTEGER,                     -- of the message with the most hops that it leased
  hops          INTEGER NOT NULL DEFAULT 0,
  started_at_ms INTEGER NOT NULL,
  ended_at_ms   INTEGER,
  error         TEXT,
  usage         TEXT,
  lines         INTEGER NOT NULL DEFAULT 0,  -- how many lines arrived; lines over the bound are counted, not kept
  CHECK ((state = 'running') = (ended_at_ms IS NULL))
) STRICT;

INSERT INTO new_turns (id, agent, fence, state, message_id, chain_id, started_at_ms, ended_at_ms, error, usage, lines)
SELECT id, agent, fence, state, (SELECT min(message_id) FROM deliveries WHERE turn_id = turns.id),
       (SELECT min(message_id) FROM deliveries WHERE turn_id = turns.id), started_at_ms, ended_at_ms, error, usage, lines
FROM turns;

-- Which turn had which message: what a delivery went through.
CREATE TABLE leases (
  turn_id    INTEGER NOT NULL REFERENCES turns (id),
  message_id INTEGER NOT NULL,
  attempt    INTEGER NOT NULL,
  at_ms      INTEGER NOT NULL,
  PRIMARY KEY (turn_id, message_id)
) STRICT, WITHOUT ROWID;

INSERT INTO leases (turn_id, message_id, attempt, at_ms)
SELECT turn_id, message_id, attempts, started_at_ms FROM deliveries JOIN turns ON turns.id = turn_id;

DROP TABLE messages;
DROP TABLE deliveries;
DROP TABLE turns;
ALTER TABLE new_messages RENAME TO messages;
ALTER TABLE new_deliveries RENAME TO deliveries;
ALTER TABLE new_turns RENAME TO turns;

CREATE UNIQUE INDEX messages_by_client_id ON messages (sender, client_id) WHERE client_id IS NOT NULL;
CREATE INDEX messages_by_thread ON messages (thread_id) WHERE thread_id IS NOT NULL;
CREATE INDEX messages_with_file ON messages (sender, body_sha256) WHERE body_sha256 IS NOT NULL;
CREATE INDEX messages_by_file ON messages (body_sha256) WHERE body_sha256 IS NOT NULL;

-- What waits, and for whom: small however many messages are old. sqlite takes such an index only for a query that says
-- its condition word for word. No index here grows with all messages and is spread by agent: each message sent would
-- write a page of it to the log. The full text knows whose a message is; the writer remembers how often a pair wrote.
CREATE INDEX deliveries_queued ON deliveries (recipient, message_id) WHERE state = 'queued';
CREATE INDEX deliveries_resting ON deliveries (available_at_ms) WHERE state = 'queued' AND attempts > 0;
CREATE INDEX deliveries_held ON deliveries (sender) WHERE state = 'held';
CREATE INDEX deliveries_dead ON deliveries (message_id) WHERE state = 'dead';
CREATE INDEX deliveries_to_operator ON deliveries (message_id) WHERE recipient = 'operator';

CREATE UNIQUE INDEX turns_running ON turns (agent) WHERE state = 'running';
CREATE INDEX turns_by_agent ON turns (agent, id);
CREATE INDEX leases_by_message ON leases (message_id);

ALTER TABLE agents ADD COLUMN policy TEXT NOT NULL DEFAULT '{}';  -- whom it may write to, and how often: of settings
ALTER TABLE agents ADD COLUMN refused INTEGER NOT NULL DEFAULT 0; -- messages that its full inbox did not take
ALTER TABLE agents ADD COLUMN lines_gone INTEGER NOT NULL DEFAULT 0; -- the last of its turn_lines that is not kept
ALTER TABLE agents ADD COLUMN line_bytes INTEGER NOT NULL DEFAULT 0; -- of those that are
UPDATE agents SET line_bytes =
  (SELECT coalesce(sum(length(CAST(line AS BLOB))), 0) FROM turn_lines WHERE agent = agents.name);
ALTER TABLE agents ADD COLUMN rests_until_ms INTEGER;             -- its last turn had to wait: no other begins before

ALTER TABLE tool_calls ADD COLUMN digest TEXT;                    -- of its arguments, where they are compared

ALTER TABLE events ADD COLUMN message_id INTEGER;                 -- what an operator or the hive did to one message
DROP INDEX events_by_agent;
CREATE INDEX events_by_message ON events (message_id) WHERE message_id IS NOT NULL;

-- Whose numbers the events and lines have: those of a restored copy go on from older ones, and are others.
CREATE TABLE timeline (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  id  TEXT NOT NULL
) STRICT;

INSERT INTO timeline (one, id) VALUES (1, lower(hex(randomblob(8))));
