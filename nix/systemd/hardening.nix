# What the units of the daemon and of its helper have in common. Both start what makes containers, and that inherits it.
{
  NoNewPrivileges = true;
  ProtectSystem = "strict";
  ProtectHome = true;
  PrivateTmp = true;
  PrivateMounts = true;
  ProtectClock = true;
  ProtectKernelModules = true;
  ProtectProc = "invisible";
  LockPersonality = true;
  RestrictRealtime = true;
  RestrictSUIDSGID = true;
  RemoveIPC = true;
  KeyringMode = "private";
  SystemCallArchitectures = "native";
  SystemCallErrorNumber = "EPERM";
  # @mount, sethostname: bwrap and systemd-nspawn mount a container's root, and give it a name.
  SystemCallFilter = [
    "@system-service"
    "@mount"
    "sethostname"
    # By which a harness in the host's network shuts itself in further.
    "landlock_create_ruleset"
    "landlock_restrict_self"
  ];
  # The provider, the dashboard, and the sockets of agents; AF_NETLINK: the loopback of a container is brought up with it.
  RestrictAddressFamilies = [
    "AF_UNIX"
    "AF_INET"
    "AF_INET6"
    "AF_NETLINK"
  ];
}
