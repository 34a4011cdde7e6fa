"""`python -m serve_app.cli`, where the command `serve-app` is not on the path."""

from serve_app.cli import app

app(prog_name="serve-app")
