"""The page at / for browsers, on which people can try the server."""
