"""Open-loop load generator for the decode server, with scenarios, reports and benchmarks."""
