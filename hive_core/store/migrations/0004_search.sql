-- Full text over bodies, and when the messages of each stretch of numbers were sent. Both are filled behind the mark,
-- so that a send costs what it did.

-- What is indexed of each message, but that a body which is kept as a file is indexed whole. `marks` are words made of
-- who sent it, who got it and its thread, so that a filter is answered by the index too. A name is written in hex: it
-- has dashes, at which the index would cut.
CREATE VIEW message_texts AS
SELECT id, body, body_sha256,
       'by' || hex(sender)
       || coalesce((SELECT group_concat(' to' || hex(recipient), '') FROM deliveries WHERE message_id = messages.id), '')
       || ' thread' || coalesce(thread_id, id) AS marks
FROM messages;

-- The words of bodies and the marks; the texts themselves stay where they are.
CREATE VIRTUAL TABLE message_words USING fts5 (
  body, marks,
  content = 'message_texts', content_rowid = 'id', columnsize = 0, tokenize = 'unicode61 remove_diacritics 2'
);

-- The index merges its own pieces in steps that search_index.py bounds: by itself it would hold the writer for a second.
INSERT INTO message_words (message_words, rank) VALUES ('automerge', 0);
INSERT INTO message_words (message_words, rank) VALUES ('crisismerge', 1000);
-- Eight pieces at once and not four: each word is written anew a third less often.
INSERT INTO message_words (message_words, rank) VALUES ('usermerge', 8);

CREATE TABLE search_mark (
  one        INTEGER PRIMARY KEY CHECK (one = 1),
  message_id INTEGER NOT NULL                   -- the last message that was indexed
) STRICT;

INSERT INTO search_mark (one, message_id) VALUES (1, 0);

CREATE TABLE message_blocks (
  block       INTEGER PRIMARY KEY,              -- the messages id / 1024 = block
  first_at_ms INTEGER NOT NULL,                 -- the earliest and the latest instant at which one of them was sent
  last_at_ms  INTEGER NOT NULL
) STRICT;

-- Events up to this number are gone, but those about a message that is kept.
CREATE TABLE events_mark (
  one  INTEGER PRIMARY KEY CHECK (one = 1),
  gone INTEGER NOT NULL
) STRICT;

INSERT INTO events_mark (one, gone) VALUES (1, 0);

-- The clock by which what is old is forgotten: it follows the wall clock, but slowly where that leaps. In a hive of
-- before it begins at the last instant that its events know, and in a new one with its first run.
CREATE TABLE retention_clock (
  one      INTEGER PRIMARY KEY CHECK (one = 1),
  shows_ms INTEGER NOT NULL,
  wall_ms  INTEGER NOT NULL                     -- what the wall clock showed when it was moved last
) STRICT;

INSERT INTO retention_clock (one, shows_ms, wall_ms) SELECT 1, at_ms, at_ms FROM events ORDER BY seq DESC LIMIT 1;
