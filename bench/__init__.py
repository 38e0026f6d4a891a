"""What headstart takes, measured."""
