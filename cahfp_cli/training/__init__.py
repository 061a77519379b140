"""The local SGD loop, evaluation and latency, shared by the commands and by federation."""
