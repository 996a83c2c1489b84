"""From the files of a store to arrays, and to the shuffled batches of training."""
