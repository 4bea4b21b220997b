"""The parts that are no mixture: linear layers, feed-forward network, norm, rotary embedding, attention, caches."""
