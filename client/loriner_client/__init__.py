"""A client of a Loriner server."""
