"""A real redis-server of a test's own: on a free port, in a folder, with the settings that the store asks for."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path

START_S = 10.0
SETTINGS = {
    "appendonly": "yes",
    "appendfsync": "always",
    "no-appendfsync-on-rewrite": "no",
    "maxmemory-policy": "noeviction",
    "save": '""',
}


class RedisServer:
    """settings: redis.conf's, in place of the store's; underscores for hyphens. `requirepass`: the url has it, too."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self._folder = folder
        self._settings = SETTINGS | {name.replace("_", "-"): value for name, value in settings.items()}
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()

    @property
    def url(self) -> str:
        password = self._settings.get("requirepass")
        return f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/0"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, **settings: str) -> None:
        """It answers when this returns. settings: from now on."""
        self._settings |= {name.replace("_", "-"): value for name, value in settings.items()}
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{name} {value}" for name, value in self._settings.items()]
        config = self._folder / "redis.conf"
        config.write_text("\n".join([*lines, "bind 127.0.0.1", f"port {self.port}", f"dir {self._folder}", ""]))
        program = shutil.which("redis-server")
        assert program, "These tests need redis-server. On Debian: apt-get install redis-server"
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen([program, str(config)], stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while self.command("PING") != "+PONG":
            assert self.running, (self._folder / "redis.log").read_text()
            assert time.monotonic() < deadline, f"redis-server did not answer within {START_S:g} s"
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def signal(self, number: int) -> None:
        """If it runs."""
        if self.running:
            assert self._process is not None
            self._process.send_signal(number)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def restart(self, **settings: str) -> None:
        """As after a crash."""
        self.kill()
        self.start(**settings)

    def command(self, *words: str) -> str:
        """The first line of its answer; empty if it does not answer."""
        password = self._settings.get("requirepass")
        try:
            with (
                socket.create_connection(("127.0.0.1", self.port), timeout=START_S) as connection,
                connection.makefile("rb") as lines,
            ):
                if password:
                    connection.sendall(_encoded("AUTH", password))
                    lines.readline()
                connection.sendall(_encoded(*words))
                return lines.readline().decode().strip()
        except OSError:
            return ""


def _encoded(*words: str) -> bytes:
    parts = [f"*{len(words)}", *(part for word in words for part in (f"${len(word.encode())}", word)), ""]
    return "\r\n".join(parts).encode()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
