"""What `scripts/chaos` is made of: planned calls and who makes them, the killer, and the judge of what was left.

Only `app.py` runs inside the service, as its subclass; the service imports nothing from here.
"""


class ChaosError(Exception):
    """The run cannot go on, or it would prove nothing. The message says why."""
