"""Jobs on a cluster elsewhere, through Ray's Jobs API."""
