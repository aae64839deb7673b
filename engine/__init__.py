"""Real integer products of quantized matrices."""
