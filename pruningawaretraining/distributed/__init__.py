"""Training on several processes: collectives, DistributedDataParallel, fully_shard."""
