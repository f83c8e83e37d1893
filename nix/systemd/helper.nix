# The helper's unit, in systemd's own words, and what the daemon's has besides when the helper starts its agents.
# nix/host/service.nix makes NixOS services of it; nix/systemd/hyperhive-root.service and helper.conf are made from it for
# other systems (`python -m tests.nix_pages`).
{
  Helper = {
    Unit = {
      Description = "hyperhive's helper, which starts and ends the containers of agents";
      StartLimitIntervalSec = 0;
    };

    Service = import ./hardening.nix // {
      Type = "notify";
      NotifyAccess = "main";
      # Fed by the loop that answers: a helper that hangs is restarted, and finds the agents again.
      WatchdogSec = 60;
      TimeoutStopSec = 15;
      Restart = "on-failure";
      RestartSec = 1;

      # Agents are units of their own and outlive it, as they do the daemon. Where they can be none they are its children.
      KillMode = "process";
      OOMPolicy = "continue";
      Slice = "hyperhive.slice";

      # Root: it makes uids, mounts and control groups. What it may do besides is what an agent's container is made with.
      UMask = "0077";
      StateDirectory = "hyperhive-root";
      StateDirectoryMode = "0700";
      # Whoever has the daemon's uid may reach the socket in there; no one else may open it.
      RuntimeDirectory = "hyperhive-root";
      RuntimeDirectoryMode = "0755";
      WorkingDirectory = "/var/lib/hyperhive-root";

      # Agents inherit it, as what becomes their containers does.
      CapabilityBoundingSet = [
        "CAP_CHOWN"
        "CAP_DAC_OVERRIDE"
        "CAP_FOWNER"
        "CAP_KILL"
        "CAP_MKNOD"
        "CAP_NET_ADMIN"
        "CAP_SETFCAP"
        "CAP_SETGID"
        "CAP_SETPCAP"
        "CAP_SETUID"
        "CAP_SYS_ADMIN"
        "CAP_SYS_CHROOT"
        "CAP_SYS_PTRACE"
        "CAP_SYS_RESOURCE"
      ];
      # What agents write is the daemon's, in directories that may not be there yet when the helper starts.
      ReadWritePaths = [
        "/var/lib"
        "/run"
      ];
      PrivateNetwork = true;
      # An agent that can be no unit of its own has its loopback all the same.
      IPAddressDeny = "any";
      IPAddressAllow = "localhost";

      # Cannot be had, as what becomes an agent's container inherits it:
      # User, PrivateUsers        it maps uids, and mounts
      # RestrictNamespaces        systemd-nspawn and bwrap make namespaces
      # ProtectControlGroups      systemd-nspawn makes groups in an agent's unit
      # PrivateDevices            systemd-nspawn makes a /dev; DevicePolicy would leave it half of one
      # ProtectKernelTunables,    they mount over parts of /proc, and the kernel then lets nobody without privileges mount
      # ProtectKernelLogs         a /proc of their own, which bwrap does in each sandbox
      # ProcSubset                it reads /proc/sys/kernel/random/boot_id, and bwrap /proc/sys/kernel/overflowuid
      # ProtectHostname           each sandbox has a name of its own
      # MemoryDenyWriteExecute    the agent's program compiles while it runs
      # fewer capabilities        CAP_KILL is for what agents leave behind; CAP_NET_ADMIN, CAP_SETFCAP, CAP_SETPCAP and
      #                           CAP_SYS_RESOURCE systemd-nspawn 252 was seen to do without, and others may not
    };

    Install.WantedBy = "multi-user.target";
  };

  # What the helper's has besides where agents are NixOS containers, whose units are the host's.
  Containers = {
    # nixos-container keeps a container in these, and in /var/lib. The rest of /nix is read-only here, so that nix asks
    # its daemon for what it would do to the store as root.
    ReadWritePaths = [
      "/etc/nixos-containers"
      "/nix/var/nix/gcroots/per-container"
      "/nix/var/nix/profiles/per-container"
    ];
    # A switch activates a system inside, under the filters of whoever began it, and that makes setuid wrappers.
    RestrictSUIDSGID = false;
  };

  # Agents are no children of the daemon then, so it makes no sandboxes, but where it builds NixOS containers: what agents
  # wrote is evaluated in one, and the daemon's unit stays as it is. `hive login` runs the program in one, and cannot:
  # `hive login --token` reads what `claude setup-token` printed to the operator. PrivateUsers cannot be had either (see
  # unit.nix), nor ProcSubset: whether what ran before the helper was of this boot is in /proc/sys/kernel/random/boot_id.
  Daemon = {
    Unit = {
      Wants = "hyperhive-root.service";
      After = "hyperhive-root.service";
    };
    Service = {
      RestrictNamespaces = true;
      ProtectKernelTunables = true;
      ProtectKernelLogs = true;
      ProtectHostname = true;
      MemoryDenyWriteExecute = true;
      SystemCallFilter = [
        "@system-service"
        "~@privileged @resources"
      ];
      RestrictAddressFamilies = [
        "AF_UNIX"
        "AF_INET"
        "AF_INET6"
      ];
    };
  };
}
