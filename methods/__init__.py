"""Other Phase 3s, each one script: the same inputs as 03, and a quant file that 04 samples."""
