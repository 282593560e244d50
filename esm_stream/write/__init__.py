"""Writing models: output shards with every tensor at a place known before the merge starts."""
