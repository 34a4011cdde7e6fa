"""Ray: thin shells, one kind of process a file. What they do is decided below; here it runs."""
