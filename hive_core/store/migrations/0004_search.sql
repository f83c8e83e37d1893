-- Full text over bodies, and when the messages of each stretch of numbers were sent. Both are filled behind the mark,
-- so that a send costs what it did.

CREATE VIEW message_texts AS SELECT id, body, NULL AS marks FROM messages;

-- The words of bodies, whole ones of files included; the texts themselves stay where they are. `marks` are words made
-- of who sent it, who got it and its thread, so that a filter is answered by the index too.
CREATE VIRTUAL TABLE message_words USING fts5 (
  body, marks,
  content = 'message_texts', content_rowid = 'id', columnsize = 0, tokenize = 'unicode61 remove_diacritics 2'
);

-- The index merges its own pieces in steps that the archive bounds: by itself it would hold the writer for a second.
INSERT INTO message_words (message_words, rank) VALUES ('automerge', 0);
INSERT INTO message_words (message_words, rank) VALUES ('crisismerge', 1000);

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
