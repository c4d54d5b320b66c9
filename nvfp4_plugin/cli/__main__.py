"""`python -m nvfp4_plugin.cli`: the `nvfp4` command."""

from nvfp4_plugin.cli import app

app()
