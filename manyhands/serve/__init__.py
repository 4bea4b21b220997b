"""The HTTP server. Needs the extra `serve`."""
