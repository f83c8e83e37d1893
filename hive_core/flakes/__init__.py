"""The flakes that NixOS containers are built of: rendered, locked, evaluated in limits, and told what they change."""
