"""Before anything imports the hub's client, which reads this once: no test may reach for the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
