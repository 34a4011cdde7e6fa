"""The operator's command `serve-app`: workspaces, keys, the ledger, models, and whether this machine is fit.

A command a verb, a file a noun; the service need not run, and may. Numbers and ids go to stdout, as one JSON document
with `--json`; errors go to stderr, a line each.
"""

from __future__ import annotations

import typer

from serve_app.cli import doctor, embed, keys, ledger, models, run, usage, workspaces
from serve_app.cli.terminal import Commands

EXIT_CODES = (
    "Exit codes: 0 done; 1 done, and something is wrong (the audit found a difference, a dead letter was refused"
    " again, a model's file is not what it should be, the doctor found a failure); 2 it could not be done, and one"
    " line on stderr says why; 130 interrupted."
)

app = typer.Typer(
    name="serve-app",
    cls=Commands,
    help="Workspaces, keys, usage, models and health of the embeddings service. Every command has --json.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(workspaces.app, name="workspace")
app.add_typer(keys.app, name="key")
app.add_typer(ledger.app, name="ledger")
app.add_typer(usage.app, name="usage")
app.add_typer(models.app, name="models")
app.command("run")(run.run)
app.command("embed")(embed.embed)
app.command("doctor")(doctor.doctor)
