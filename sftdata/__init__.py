"""Turn SFT data into verified constant-length shards."""
