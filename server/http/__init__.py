"""HTTP: routes, connections, authentication, responses."""
