"""What a kernel is stopped for."""


class Fault(Exception):
    """A kernel did what it must not; where a card would stop, or give what nobody asked for."""
