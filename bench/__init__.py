"""headstart beside its peers, on the machine at hand: `python -m bench`, or `make bench`."""
