"""What `scripts/simulate` is made of: constants, a slice of a cluster event by event, and the arithmetic of the whole.

The slice forms its units with the service's own `PackingQueue`; nothing here is imported by the service.
"""
