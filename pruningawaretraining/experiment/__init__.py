"""The config-driven experiment: model, data, optimizer and pruning by name; trained, pruned, exported and reported."""
