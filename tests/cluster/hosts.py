"""Machines for tests, all of them on this computer: each with its own address, processes, host name, disk and sshd.

A machine is a process in network, mount, PID, IPC and UTS namespaces of its own; its disk is a tmpfs that holds a copy of
/etc, this computer's /usr (read-only) and what is shared with it. Cables lead to a switch, a bridge in one more network
namespace: nothing is made in this computer's own network, and no packet leaves. Nothing has a name outside of the
namespaces and every machine ends when the pipe from the process that made it does, so that nothing can stay behind,
however that process ends.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"
TOOLS = ("ip", "mount", "nsenter", "pivot_root", "rsync", "ssh", "ssh-keygen", "sshd", "unshare")
TOOL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SSHD = """
HostKey /etc/ssh/machine_key
AuthorizedKeysFile /etc/ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
"""
INIT = """
set -eu
hostname {name}
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs {disk}
cd {disk}
mkdir -m 755 dev proc sys run run/sshd usr var var/log .old
mkdir -m 700 root
mkdir -m 1777 tmp var/tmp
cp -a /etc etc
for part in /bin /sbin /lib /lib32 /lib64 /libx32; do
    if [ -L $part ]; then cp -P $part .$part; elif [ -d $part ]; then mkdir .$part; mount --bind $part .$part; fi
done
mount --bind /usr usr
mount -o remount,bind,ro usr
mount --rbind /dev dev
mount -t tmpfs tmpfs dev/shm
mount --rbind /sys sys
mount -t proc proc proc
{shares}
pivot_root . .old
umount -l /.old
cd /
echo ready
read -r _  # until the maker of this machine has ended
"""
SHARE = "mkdir -p .{at}; mount --bind {path} .{at}; mount -o remount,bind,ro .{at}"
WRITABLE = (
    "mkdir -p .{at} .writes/{number}/upper .writes/{number}/work; mount -t overlay overlay"
    " -o lowerdir={path},upperdir=.writes/{number}/upper,workdir=.writes/{number}/work .{at}"
)


class HostsError(Exception):
    """This computer cannot make machines; the message is one line that says why."""


@dataclass(frozen=True)
class Share:
    """A directory of this computer that a machine has, too: at `at` (default: the same path), read-only or, where
    `writable`, as a copy of its own."""

    path: str
    at: str = ""
    writable: bool = False


class Machine:
    """A machine that is switched on.

    `run` and `popen` execute a shell command as root in /root, with the machine's environment; `path` is a file of its
    disk as this computer sees it.
    """

    def __init__(self, name: str, address: str, process: subprocess.Popen, init: int, env: Mapping[str, str]):
        self.name, self.address, self.init = name, address, init
        self._process, self._env = process, dict(env)

    def words(self, command: str) -> list[str]:
        env = {"PATH": TOOL_PATH, "HOME": "/root", "USER": "root", "LANG": "C.UTF-8", "TERM": "dumb", **self._env}
        inside = ["nsenter", f"--target={self.init}", "--mount", "--pid", "--net", "--uts", "--ipc", "--"]
        return [*inside, "env", "-i", "-C", "/root", *(f"{k}={v}" for k, v in env.items()), "bash", "-c", command]

    def run(self, command: str, timeout_s: float = 120) -> subprocess.CompletedProcess:
        """Return the finished command, its stdout and stderr together in `stdout`."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run(self.words(command), **streams, text=True, timeout=timeout_s)

    def check(self, command: str, timeout_s: float = 120) -> str:
        """Return what the command printed.  Raises AssertionError when it fails."""
        done = self.run(command, timeout_s)
        assert done.returncode == 0, f"{self.name}: {command} -> {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    def popen(self, command: str, **options) -> subprocess.Popen:
        return subprocess.Popen(self.words(command), stdin=subprocess.DEVNULL, text=True, **options)

    def path(self, inside: str) -> Path:
        return Path(f"/proc/{self.init}/root{inside}")

    def power_cut(self) -> None:
        """End every process of the machine at once; its disk is gone."""
        self._process.kill()  # unshare, whose end kills the machine's first process, whose end kills all others
        self._process.wait()
        self._process.stdin.close()


class Hosts:
    """Machines on one switch, switched off at the end of the block.  `folder` is an empty directory for keys.

    Raises HostsError where this computer cannot make them.
    """

    def __init__(self, folder: Path):
        if lack := lacking():
            raise HostsError(lack)
        self._folder, self._disk = folder, folder / "disk"
        self._disk.mkdir()
        self._machines: dict[str, Machine] = {}
        self._addresses: dict[str, str] = {}
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/key")

    def __enter__(self) -> "Hosts":
        self._switch, self._switch_pid = _namespaced(["--net"], "echo ready; read -r _")
        self._on_switch("link", "add", "switch", "type", "bridge")
        self._on_switch("link", "set", "switch", "up")
        return self

    def __exit__(self, *error) -> None:
        for machine in self._machines.values():
            machine.power_cut()
        self._switch.kill()
        self._switch.wait()
        self._switch.stdin.close()

    def address(self, name: str) -> str:
        """Return the address that a machine of this name has, or will have."""
        return self._addresses.setdefault(name, f"{NETWORK}.{len(self._addresses) + 1}")

    def start(self, name: str, shares: Sequence[Share] = (), env: Mapping[str, str] | None = None) -> Machine:
        """Switch a machine on, with a new disk, and return it. `env` is for its login shells and its commands.

        Every machine's root may log in to every other with the key in ~/.ssh.
        """
        mounts = [
            (WRITABLE if share.writable else SHARE).format(path=share.path, at=share.at or share.path, number=number)
            for number, share in enumerate(shares)
        ]
        script = INIT.format(name=name, disk=self._disk, shares="\n".join(mounts))
        process, init = _namespaced(["--net", "--mount", "--pid", "--ipc", "--uts"], script)
        machine = self._machines[name] = Machine(name, self.address(name), process, init, env or {})
        self._plug(machine)
        self._set_up(machine, env or {})
        return machine

    def cut(self, machine: Machine) -> None:
        """Pull the machine's cable; it goes on alone."""
        self._on_switch("link", "set", _cable(machine), "down")

    def _plug(self, machine: Machine) -> None:
        """Lay a cable from the switch to the machine. The default route leads nowhere, but Ray asks the routes for its
        own address."""
        cable, other_end = _cable(machine), ["peer", "name", "eth0", "netns", str(machine.init)]
        self._on_switch("link", "add", cable, "type", "veth", *other_end)
        self._on_switch("link", "set", cable, "master", "switch", "up")
        machine.check(
            f"ip link set lo up && ip addr add {machine.address}/24 dev eth0 && ip link set eth0 up"
            f" && ip route add default via {NETWORK}.254"
        )

    def _set_up(self, machine: Machine, env: Mapping[str, str]) -> None:
        """Write what a person would who installs the machine: names, key, profile; start sshd."""
        names = "".join(f"{NETWORK}.{k} {name}\n" for k, name in enumerate(self._addresses, 1))
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())
        for file, text in {
            "/etc/hosts": f"127.0.0.1 localhost\n{names}",
            "/etc/resolv.conf": "",  # a server that nobody can reach costs seconds at every look-up
            "/etc/ssh/sshd_config": SSHD,
            "/etc/ssh/authorized_keys": (self._folder / "key.pub").read_text(),
            "/root/.bashrc": exports,
            "/root/.ssh/id_ed25519": (self._folder / "key").read_text(),
        }.items():
            place = machine.path(file)
            place.parent.mkdir(mode=0o700, exist_ok=True)
            place.unlink(missing_ok=True)
            place.write_text(text)
        machine.path("/root/.ssh/id_ed25519").chmod(0o600)
        machine.check("ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/machine_key && $(command -v sshd)")

    def _on_switch(self, *words: str) -> None:
        _run("nsenter", f"--target={self._switch_pid}", "--net", "ip", *words)


def lacking() -> str | None:
    """Return what this computer lacks to make machines, None if nothing."""
    if not sys.platform.startswith("linux"):
        return f"machines for tests need Linux namespaces, this is {sys.platform}"
    if os.geteuid() != 0:
        return f"machines for tests need root (namespaces, sshd), this is user {os.geteuid()}"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=TOOL_PATH) is None]
    if missing:
        return (
            f"machines for tests need {', '.join(missing)}; on Debian or Ubuntu: apt-get install iproute2 openssh-client"
            f" openssh-server rsync util-linux"
        )
    return None


def _cable(machine: Machine) -> str:
    return f"to-{machine.name}"


def _namespaced(kinds: Sequence[str], script: str) -> tuple[subprocess.Popen, int]:
    """Run a shell script in new namespaces until it says that it is ready; return unshare's process and the id of the
    script's.  Raises HostsError when it ends instead."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        ["unshare", *kinds, "--fork", "--kill-child", "bash", "-c", script],
        **pipes, text=True, env={"PATH": TOOL_PATH}, start_new_session=True,
    )  # fmt: skip
    if process.stdout.readline() != "ready\n":
        process.kill()
        said = process.communicate()[1].split("\n")[0]
        raise HostsError(f"this computer does not allow {' '.join(kinds)} namespaces or mounts in them: {said}")
    return process, int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def _run(*words: str) -> None:
    """Run a command.  Raises HostsError with what it says when it fails."""
    done = subprocess.run(words, capture_output=True, text=True, env={"PATH": TOOL_PATH})
    if done.returncode:
        raise HostsError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
