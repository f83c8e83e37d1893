-- What waits for a span of time, on a clock that was set back to before its beginning: the earliest instant that this
-- clock has shown since. The span counts from there until the clock has come to that beginning again.

ALTER TABLE questions ADD COLUMN counts_from_ms INTEGER;
UPDATE questions SET counts_from_ms = asked_at_ms;
CREATE INDEX questions_asked ON questions (asked_at_ms) WHERE state = 'open';

ALTER TABLE reminders ADD COLUMN counts_from_ms INTEGER;  -- NULL: it is due at an instant that its agent gave
CREATE INDEX reminders_set ON reminders (set_at_ms) WHERE state = 'open';
