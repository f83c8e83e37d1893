-- The emergency stop.

CREATE TABLE swarm (
  one          INTEGER PRIMARY KEY CHECK (one = 1),
  frozen_at_ms INTEGER                          -- since when every agent is kept from the model; NULL: none is
) STRICT;

INSERT INTO swarm (one) VALUES (1);
