-- Restarts: who asked for one, until it begins; then who did, until its hello is told. A daemon may die in between.
ALTER TABLE container_states ADD COLUMN restart_asked_by TEXT;
ALTER TABLE container_states ADD COLUMN restart_begun_by TEXT;
