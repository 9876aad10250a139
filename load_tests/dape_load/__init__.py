"""Load tests: what is sent (workload), how (scenarios, closed and open loop), and what must come of it."""
