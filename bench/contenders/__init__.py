"""One script for each way to train: run in a process of its own, it prints one line of JSON."""
