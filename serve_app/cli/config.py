"""`deployments.yaml` as the service will read it, without starting anything: the same settings classes, and no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from serve_app.cli.terminal import Failed
from serve_app.core.catalog import ModelSpec
from serve_app.core.settings import IdempotencySettings, IngressSettings, StoreSettings, Terms
from serve_app.core.strict import StrictModel
from serve_app.sinks.settings import UsageSettings

BUILDERS: dict[str, type[StrictModel]] = {
    "serve_app.app:ingress": IngressSettings,
    "serve_app.app:idempotency": IdempotencySettings,
    "serve_app.app:usage": UsageSettings,
    "serve_app.app:model": ModelSpec,
}
DEFAULT_PORT = 8000  # Serve's

ConfigPath = Annotated[Path, typer.Option("--config", help="A Serve config, as scripts/serve takes it.")]
DEFAULT = Path("deployments.yaml")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What was understood, and in `faults`, a line each, what was not."""

    path: Path
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    models: list[ModelSpec] = field(default_factory=list)
    services: list[StoreSettings] = field(default_factory=list)  # ingress, idempotency, usage
    terms: list[Terms] = field(default_factory=list)  # of the ingress and of the usage actor
    faults: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)  # applications that are not ours

    @property
    def store(self) -> str | None:
        """The first that is named; None: the default, or the environment's."""
        return next((it.store for it in self.services if it.store), None)


def read(path: Path) -> Config:
    """Raises Failed if there is no such file, or it is no YAML mapping."""
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise Failed(f"There is no file {path}. Name a Serve config with --config.") from None
    except UnicodeDecodeError:
        raise Failed(f"{path} is no text.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise Failed(f"{path}{f', line {mark.line + 1}' if mark else ''}: this is no YAML.") from None
    if not isinstance(content, dict) or not isinstance(content.get("applications"), list):
        raise Failed(f"{path} has no list of applications: it is no Serve config.")
    http = content.get("http_options") or {}
    found = Config(path=path, host=str(http.get("host", "127.0.0.1")), port=int(http.get("port", DEFAULT_PORT)))
    for application in content["applications"]:
        _add(found, application if isinstance(application, dict) else {})
    return found


def models(path: Path) -> list[ModelSpec]:
    """Raises Failed with the first fault, too."""
    found = read(path)
    if found.faults:
        raise Failed(f"{path}: {found.faults[0]}")
    return found.models


def _add(config: Config, application: dict[str, Any]) -> None:
    name, builder = application.get("name", "?"), BUILDERS.get(str(application.get("import_path")))
    if builder is None:
        config.foreign.append(f"{name} ({application.get('import_path')})")
        return
    try:
        settings = builder.model_validate(application.get("args") or {})
        if isinstance(settings, IngressSettings | UsageSettings):
            config.terms.append(Terms.model_validate(_user_config(application)))
    except ValidationError as error:
        config.faults.extend(f"application {name}: {_told(it)}" for it in error.errors(include_input=False))
        return
    if isinstance(settings, ModelSpec):
        config.models.append(settings)
    elif isinstance(settings, StoreSettings):
        config.services.append(settings)


def _user_config(application: dict[str, Any]) -> dict[str, Any]:
    """Of its one deployment."""
    found = [it.get("user_config") for it in application.get("deployments") or ()]
    return next(filter(None, found), {})


def _told(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    return " ".join(f"{where + ': ' if where else ''}{error['msg'].removeprefix('Value error, ')}".split())
