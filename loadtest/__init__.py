"""An open-loop load generator for the decode server, and its report."""
