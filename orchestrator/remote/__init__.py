"""Submit jobs to a remote Ray cluster, and watch and stop them, through Ray's Jobs API."""
