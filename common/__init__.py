"""What the numbered scripts stand on: nothing in here is in the paper."""
