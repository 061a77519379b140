"""Learning: the local SGD loop, statistics of batch norms measured anew, the curvature of what was trained."""
