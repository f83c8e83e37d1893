-- What agents reach. Each part stands for itself.

-- Forges: where the pull requests and issues of a project are. The token is a file beside the database.
CREATE TABLE forges (
  id             INTEGER PRIMARY KEY AUTOINCREMENT,  -- never another's again: what came from it names it
  project        TEXT NOT NULL UNIQUE,
  kind           TEXT NOT NULL CHECK (kind IN ('forgejo', 'github')),
  url            TEXT NOT NULL,
  repository     TEXT NOT NULL,              -- OWNER/REPO
  login          TEXT NOT NULL,              -- whose token it is, as the forge said
  added_at_ms    INTEGER NOT NULL,           -- what happened there before is not told
  looked_at_ms   INTEGER,                    -- when its notifications were asked for last
  failures       INTEGER NOT NULL DEFAULT 0, -- looks in a row that failed
  rests_until_ms INTEGER,                    -- and is not asked before
  error          TEXT                        -- why the last look failed
) STRICT;

-- What became of each notification: once for each state of its thread that was seen.
CREATE TABLE forge_notices (
  id            INTEGER PRIMARY KEY AUTOINCREMENT,  -- the cause of its message
  forge_id      INTEGER NOT NULL,
  notification  TEXT NOT NULL,
  updated_at_ms INTEGER NOT NULL,            -- of the thread, as the forge told it
  comments      INTEGER NOT NULL,            -- how many it had: two changes can be of one second
  repository    TEXT NOT NULL,
  kind          TEXT,                        -- issue or pull_request; NULL: about something else
  number        INTEGER,
  lane          TEXT,                        -- NULL: no lane took it, and nobody was told
  message_id    INTEGER,
  at_ms         INTEGER NOT NULL,
  UNIQUE (forge_id, notification, updated_at_ms, comments)
) STRICT;

CREATE INDEX forge_notices_by_thread ON forge_notices (forge_id, number) WHERE message_id IS NOT NULL;
CREATE INDEX forge_notices_by_lane ON forge_notices (lane, at_ms) WHERE lane IS NOT NULL;
CREATE INDEX forge_notices_by_time ON forge_notices (at_ms);

-- What agents wrote there. It is begun before the forge is asked, so that one that was cut off is looked for there.
CREATE TABLE forge_writes (
  id        INTEGER PRIMARY KEY AUTOINCREMENT,
  forge_id  INTEGER NOT NULL,
  agent     TEXT NOT NULL,
  what      TEXT NOT NULL CHECK (what IN ('pull_request', 'issue', 'comment')),
  digest    TEXT NOT NULL,                   -- of what was to be written
  mark      TEXT NOT NULL,                   -- stands in what was written, and nowhere else
  state     TEXT NOT NULL CHECK (state IN ('begun', 'done', 'refused')),
  number    INTEGER,                         -- of its thread, when it is done
  at_ms     INTEGER NOT NULL
) STRICT;

CREATE INDEX forge_writes_of ON forge_writes (agent, at_ms);

-- Projects: the repositories that agents work on, each with a mirror of ours.
CREATE TABLE projects (
  name          TEXT PRIMARY KEY,
  source        TEXT NOT NULL,              -- a path of the host, or a url without a password
  credential    TEXT NOT NULL CHECK (credential IN ('none', 'key', 'token')),
  branch        TEXT NOT NULL,              -- that a clone begins with
  added_by      TEXT NOT NULL,
  added_at_ms   INTEGER NOT NULL,
  fetched_at_ms INTEGER NOT NULL,           -- when it was fetched last, and that went well
  bytes         INTEGER NOT NULL,           -- that its mirror takes
  trouble       TEXT                        -- why it could not be fetched since
) STRICT;

-- Files that the operator attached to messages. What one holds is kept as a large body is, named by its digest.
CREATE TABLE attachments (
  message_id INTEGER NOT NULL REFERENCES messages (id),
  position   INTEGER NOT NULL,               -- from 1, as they were given
  name       TEXT NOT NULL,
  bytes      INTEGER NOT NULL,
  sha256     TEXT NOT NULL,
  PRIMARY KEY (message_id, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX attachments_by_file ON attachments (sha256);

-- Connections: what agents connected to, or tried to, through the hive's proxy.
CREATE TABLE connections (
  id          INTEGER PRIMARY KEY AUTOINCREMENT,
  agent       TEXT NOT NULL,
  turn_id     INTEGER,                       -- that ran when it began
  host        TEXT NOT NULL,                 -- '*': several, of one that makes too many
  port        INTEGER NOT NULL,
  how         TEXT NOT NULL,                 -- tunnel, or the method of a plain request
  address     TEXT,                          -- that was connected to
  sent        INTEGER NOT NULL,              -- bytes from the agent
  received    INTEGER NOT NULL,              -- and to it
  began_at_ms INTEGER NOT NULL,
  ended_at_ms INTEGER,
  verdict     TEXT CHECK (verdict IN ('passed', 'refused', 'failed', 'cut')),  -- none while it is open
  reason      TEXT,
  count       INTEGER NOT NULL               -- how many this one stands for
) STRICT;
CREATE INDEX connections_of ON connections (agent, began_at_ms);
CREATE INDEX connections_by_end ON connections (ended_at_ms);
CREATE INDEX connections_open ON connections (id) WHERE verdict IS NULL;

-- What agents run of claude: the newest that is kept.
CREATE TABLE claude_pins (
  id       INTEGER PRIMARY KEY AUTOINCREMENT,
  kept     INTEGER NOT NULL,                 -- 1: as a copy of ours; 0: something else decides, and it was seen
  version  TEXT NOT NULL,
  sha256   TEXT NOT NULL,
  source   TEXT NOT NULL,                    -- where it was found
  bytes    INTEGER NOT NULL,
  mtime_ns INTEGER NOT NULL,                 -- of what was found there
  approval INTEGER,                          -- NULL: the first one that was found
  at_ms    INTEGER NOT NULL
) STRICT;
