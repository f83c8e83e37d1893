# The daemon's unit, in systemd's own words. nix/host/service.nix makes the NixOS service of it, and
# nix/systemd/hyperhive.service is made from it for other systems (`python -m tests.nix_pages`).
{
  Unit = {
    Description = "hyperhive, a swarm of coding agents";
    # Not network-online: a swarm whose provider is away waits for it by itself.
    After = "network.target";
    # A daemon that cannot start is tried again for ever, seldom: agents that run wait for it.
    StartLimitIntervalSec = 0;
  };

  Service = import ./hardening.nix // {
    # Ready when every socket listens. The watchdog is fed by the loop that serves them, so one that hangs is restarted.
    Type = "notify";
    NotifyAccess = "main";
    WatchdogSec = 60;
    TimeoutStartSec = 300; # a migration of a large database
    TimeoutStopSec = 15; # it ends by itself within 5 s
    Restart = "on-failure";
    RestartSec = 2;

    # Agents outlive the daemon: the next one adopts them, and they end by themselves when none comes.
    KillMode = "process";
    # An agent that the kernel kills for its memory is the daemon's to restart, not a reason to end the daemon.
    OOMPolicy = "continue";
    Slice = "hyperhive.slice";

    # Its group is what host.sock belongs to: members of hive-admin may command the daemon.
    User = "hyperhive";
    Group = "hive-admin";
    UMask = "0077";
    StateDirectory = "hyperhive";
    StateDirectoryMode = "0700";
    # Agents that run have its directories bound: a restart must not wipe them.
    RuntimeDirectory = "hyperhive";
    RuntimeDirectoryMode = "0750";
    RuntimeDirectoryPreserve = "yes";
    WorkingDirectory = "/var/lib/hyperhive";

    # With hardening.nix all that the job allows. Agents are children of the daemon and inherit it; bwrap makes their
    # sandboxes, and what would keep it from that is left out below.
    CapabilityBoundingSet = "";
    AmbientCapabilities = "";
    PrivateDevices = true;
    DevicePolicy = "closed";
    ProtectControlGroups = true;

    # Cannot be had (but see helper.nix):
    # RestrictNamespaces        bwrap makes namespaces
    # ProtectKernelTunables,    they mount over parts of /proc, and the kernel then lets nobody without privileges mount
    # ProtectKernelLogs         a /proc of their own, which bwrap does in each sandbox
    # ProcSubset                bwrap reads /proc/sys/kernel/overflowuid
    # ProtectHostname           each sandbox has a name of its own
    # PrivateUsers              whoever approves by host.sock would be written down as uid 65534, whoever it was
    # MemoryDenyWriteExecute    the agent's program compiles while it runs
    # IPAddressDeny             the model provider has no fixed address
    # DynamicUser               what agents wrote keeps its owner
  };

  Install = {
    WantedBy = "multi-user.target";
    Alias = "hive-c0re.service";
  };
}
