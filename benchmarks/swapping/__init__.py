"""The parts of `make bench-swap`: versions that their answers tell apart, the traffic, the count."""
