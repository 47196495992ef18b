"""After the launch: starting a server, asking a running one, and keeping what it really took."""
