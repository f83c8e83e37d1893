-- Systems: what the containers of sandbox = "nixos-container" were built from. An agent's settings come from here when it
-- has a row, and from agent.toml when it has none.

CREATE TABLE systems (
  agent  TEXT PRIMARY KEY,
  sha    TEXT NOT NULL,  -- the commit
  path   TEXT NOT NULL,  -- of the nix store
  inputs TEXT NOT NULL   -- where hyperhive and nixpkgs were, as flakes
) STRICT, WITHOUT ROWID;

-- Updates: an agent that did not come up after it was replaced holds up the others.

ALTER TABLE container_states ADD COLUMN update_failed TEXT;  -- the generation with which it did not come up
