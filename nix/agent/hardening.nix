# What an agent may do in its container: as little as under the other sandboxes (docs/isolation.md).
{
  NoNewPrivileges = true;
  CapabilityBoundingSet = "";
  RestrictNamespaces = true;
  RestrictAddressFamilies = [
    "AF_UNIX"
    "AF_INET"
    "AF_INET6"
    "AF_NETLINK"
  ];
  SystemCallArchitectures = "native";
  # The names are those of hive_core/containers/seccomp.py.
  SystemCallErrorNumber = "EPERM";
  SystemCallFilter = [
    "~add_key"
    "~request_key"
    "~keyctl"
    "~syslog"
    "~init_module"
    "~finit_module"
    "~delete_module"
    "~kexec_load"
    "~kexec_file_load"
    "~bpf"
    "~perf_event_open"
    "~userfaultfd"
    "~io_uring_setup"
    "~io_uring_enter"
    "~io_uring_register"
    "~open_by_handle_at"
    "~mount"
    "~umount2"
    "~pivot_root"
    "~move_mount"
    "~fsopen"
    "~fsconfig"
    "~fsmount"
    "~fspick"
    "~mount_setattr"
  ];
  KeyringMode = "private";
  # Settings of the whole kernel, which go by the uid alone, and what tells of the host.
  ProtectKernelTunables = true;
  ReadOnlyPaths = [
    "-/proc/sys"
    "-/proc/sysrq-trigger"
    "-/proc/irq"
    "-/proc/bus"
    "-/proc/acpi"
    "-/proc/fs"
    "-/proc/scsi"
    "-/proc/pressure"
    "-/proc/driver"
    "-/proc/mtrr"
    # Settings that stand above all others, an approved commit's too.
    "-/etc"
  ];
  InaccessiblePaths = [
    "-/proc/keys"
    "-/proc/key-users"
    "-/proc/kmsg"
  ];
}
