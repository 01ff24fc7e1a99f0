"""Plan → Ray: sessions, worker groups, and the run from start to report."""
