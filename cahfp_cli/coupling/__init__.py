"""Which channels hang together: atoms, one rule an operator family, a trace, and the channel groups that come of it."""
