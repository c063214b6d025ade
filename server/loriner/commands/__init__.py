"""One module for each family of sub-commands: its flags and what it does; see `cli.py`."""
