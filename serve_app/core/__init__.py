"""Everything the service decides, as pure functions and values: no I/O, no clock, no randomness, no framework.

The folders above bring the clock, the network and the device; nothing here knows them.
"""
