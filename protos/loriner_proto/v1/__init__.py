"""Version 1: fields are added, never renumbered, renamed or reused."""
