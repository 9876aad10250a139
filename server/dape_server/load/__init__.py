"""Puts load on an HTTP server and measures what its clients see, through routes that any server has."""
