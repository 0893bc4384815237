"""`pagewire bench`: correctness first, then time, beside the roof and the peers of the same run."""
