"""Raw files → Arrow shards + manifest → an exact order → each worker's rows through Ray Data."""
