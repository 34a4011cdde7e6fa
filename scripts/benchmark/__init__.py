"""What `scripts/bench` is made of: texts, an HTTP client, the server it starts, the in-process ceiling, and the report.

Nothing here is imported by the service.
"""


class BenchError(Exception):
    """The run cannot go on, or its figures would mean nothing. The message says why."""
